"""`apollo-sft workflow FILE.yaml`: run AlphaApollo's workflow files with our modules.

A file holds `preprocess` (modules with their args), `runner` (how the trainer is started, and its overrides) and
perhaps `env`. All of it is read and checked before the first command runs.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ValidationError
from yaml import YAMLError

from apollo_sft.cli.train import run_passing_signals
from apollo_sft.config.compose import compose
from apollo_sft.errors import ConfigError
from apollo_sft.redact import redact

USAGE = """apollo-sft workflow FILE.yaml [--dry-run] [key=value …]

  --dry-run                   print the commands and stop
  key=value                   a key of the trainer, after the file's own; --key=value and --key value mean the same
  preprocess.ARG=value        an argument of every step, or its module: preprocess.module=…
  preprocess.0.ARG=value      the same of one step, counted from 0
  runner.torchrun.KEY=value   how the trainer is started, such as runner.torchrun.nproc_per_node=4
"""
TRAINERS = (
    "verl.trainer.fsdp_sft_trainer",
    "alphaapollo.core.generation.verl.trainer.fsdp_sft_trainer",
    "apollo_sft",
)
PREPARES = {
    "alphaapollo.data_preprocess.prepare_sft_tool": "sft-tool",
    "alphaapollo.data_preprocess.prepare_sft_no_tool": "sft-no-tool",
    "examples.data_preprocess.gsm8k": "gsm8k",
    "examples.data_preprocess.prepare_informal_math": "informal-math",
    "examples.data_preprocess.multiturn": "multiturn",
}
"""The data set of `apollo-sft prepare …` for each module."""
OURS = [sys.executable, "-m", "apollo_sft.cli.main"]
ONE_HOST: dict[str, Any] = {"standalone": True, "nnodes": 1, "nproc_per_node": 1}


class Step(BaseModel, extra="forbid"):
    """A preparation of data."""

    module: str
    args: dict[str, Any] = {}


class Runner(BaseModel, extra="forbid"):
    """How the trainer is started."""

    launcher: str = "python"
    module: str
    torchrun: dict[str, Any] = {}
    overrides: list[Any] = []


class Workflow(BaseModel, extra="forbid"):
    """A workflow file."""

    preprocess: list[Step] = []
    runner: Runner
    env: dict[str, Any] = {}


def main(arguments: list[str]) -> int:
    """Run a workflow. Return 0, or the exit code of the command that failed; later ones are not run.

    Raises: ConfigError.
    """
    if "--help" in arguments or "-h" in arguments:
        print(USAGE)
        return 0

    file, pairs = _read_words([word for word in arguments if word != "--dry-run"])
    workflow, overrides = _read_file(file, pairs)

    # All commands are made, and checked, before the first one runs: a preparation may take hours.
    commands = [list(_preparation(step)) for step in workflow.preprocess]
    commands.append(_training(workflow.runner, [*map(str, workflow.runner.overrides), *overrides]))
    environment = os.environ | {name: str(value) for name, value in workflow.env.items()}
    for command in commands:
        print(redact(f"+ {shlex.join(command)}"), flush=True)
        if "--dry-run" in arguments:
            continue
        code = run_passing_signals(command, environment)
        if code:
            return code

    return 0


def _read_words(words: list[str]) -> tuple[Path, list[tuple[str, str]]]:
    """Return the file and the (key, value) pairs of a command line. Raises: ConfigError."""
    files = []
    pairs = []
    waiting = iter(words)
    for word in waiting:
        key, equals, value = word.removeprefix("--").partition("=")
        if word.startswith("-") and not equals:
            value = next(waiting, "--")
            if value.startswith("--"):
                raise ConfigError(f"{word} has no value", expected=f"{word} VALUE, or key=value")
        if key == "config" or not (equals or word.startswith("-")):
            files.append(value or key)
        else:
            pairs.append((key, value))

    if len(files) != 1:
        raise ConfigError("a workflow is one file", found=" ".join(files) or "none", expected="FILE.yaml key=value …")
    return Path(files[0]).expanduser(), pairs


def _read_file(file: Path, pairs: list[tuple[str, str]]) -> tuple[Workflow, list[str]]:
    """Return the workflow, changed by the pairs that are its own and resolved, and the other pairs: the trainer's.

    Raises: ConfigError.
    """
    try:
        tree = Workflow.model_validate(OmegaConf.to_container(OmegaConf.load(file))).model_dump()
        overrides = [f"{key}={value}" for key, value in pairs if not _set(tree, key, value)]
        return Workflow.model_validate(OmegaConf.to_container(OmegaConf.create(tree), resolve=True)), overrides
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(map(str, problem["loc"])) or "the file"
        raise ConfigError(f"{file} is not the workflow of a training", found=f"{where}: {problem['msg']}") from error
    except (OSError, UnicodeDecodeError, YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"{file} cannot be read as a workflow", found=str(error)) from error


def _set(tree: dict[str, Any], key: str, value: str) -> bool:
    """Set a key of the file, before references are resolved. Return False for a key of the trainer.

    Raises: ConfigError.
    """
    section, _, name = key.partition(".")
    if section == "runner":
        changed = OmegaConf.merge(tree, OmegaConf.from_dotlist([f"{key}={value}"]))
        tree |= OmegaConf.to_container(changed)  # type: ignore[arg-type]
    if section != "preprocess":
        return section == "runner"

    # A step is named by its number or its module; without a name all steps are meant.
    steps = {f"{at}.": step for at, step in enumerate(tree["preprocess"])}
    steps |= {f"{step['module']}.": step for step in steps.values()}
    one = next((prefix for prefix in steps if name.startswith(prefix)), "")
    argument = name.removeprefix(one)
    if not argument or "." in argument:
        raise ConfigError(f"{key}: there is no such step", expected=", ".join(f"preprocess.{each}…" for each in steps))

    chosen = tree["preprocess"]
    if one:
        chosen = [steps[one]]

    for step in chosen:
        if argument == "module":
            step["module"] = value
        elif argument == "data_sources":
            step["args"][argument] = value.split(",")
        else:
            step["args"][argument] = value

    return True


def _preparation(step: Step) -> Iterator[str]:
    """Yield the words of `apollo-sft prepare …` with the step's args as options.

    Raises: ConfigError for a module that we do not have.
    """
    if step.module not in PREPARES:
        raise ConfigError(f"preprocess: there is no module {step.module} here", expected=", ".join(PREPARES))

    yield from (*OURS, "prepare", PREPARES[step.module])
    for name, value in step.args.items():
        if value is False:
            continue
        yield f"--{name}"
        if isinstance(value, list):
            yield from map(str, value)
        elif value is not True and value is not None:
            yield str(value)


def _training(runner: Runner, overrides: list[str]) -> list[str]:
    """Return the command of the training. Raises: ConfigError for a command line that the trainer would refuse."""
    if runner.module not in TRAINERS:
        raise ConfigError(f"runner: there is no module {runner.module} here", expected=" or ".join(TRAINERS))
    if runner.launcher not in ("torchrun", "python"):
        raise ConfigError("runner.launcher cannot be used", found=runner.launcher, expected="torchrun or python")

    compose(overrides)  # raises what the trainer would raise, hours later

    options = dict(ONE_HOST)
    if runner.launcher == "torchrun":
        options |= runner.torchrun
    # On one host our own launcher replaces torchrun: it passes exit codes and signals on.
    if options == ONE_HOST | {"nproc_per_node": options["nproc_per_node"]}:
        return [*OURS, "train", f"--nproc={options['nproc_per_node']}", *overrides]

    words = []
    for name, value in options.items():
        if value is True:
            words.append(f"--{name}")
        elif value:
            words.append(f"--{name}={value}")

    return [sys.executable, "-m", "apollo_sft.cli.launcher", *words, "-m", "apollo_sft", *overrides]

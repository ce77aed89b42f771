"""The command line of a training: `key=value …`, `--cfg job`, `--help`. No torch here."""

from __future__ import annotations

import os
import sys

from apollo_sft.config.checks import check_paths
from apollo_sft.config.compose import YAML_PATH, Composed, compose, to_yaml
from apollo_sft.errors import ConfigError
from apollo_sft.parallel.failure import is_main

USAGE = """Train: python -m apollo_sft key=value …
       torchrun --standalone --nnodes=1 --nproc_per_node=N -m apollo_sft key=value …
       apollo-sft train [--nproc N] key=value …   starts one process per GPU by itself

  --help     this text
  --cfg job  print the resolved configuration and stop

Every key, its default and its meaning:
"""


def compose_job(arguments: list[str]) -> Composed | None:
    """Compose the config, and refuse it before torch is imported if it cannot run.

    Return None when the command line only requests a text, which is printed.
    Raises: ConfigError.
    """
    if "--help" in arguments or "-h" in arguments:
        print_once(USAGE + "\n" + YAML_PATH.read_text(encoding="utf-8"))
        return None
    if "--cfg" in arguments:
        print_once(_resolved(arguments).rstrip())
        return None

    # Compose knows no files: `plan` and `--cfg` work without them, a training does not.
    composed = compose(arguments)
    check_paths(composed.config.data, composed.config.model, set(composed.overridden))
    return composed


def print_once(text: str) -> None:
    """Print on rank 0."""
    if not is_main():
        return
    try:
        print(text, flush=True)
    except BrokenPipeError:  # `--help | head`: the reader has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _resolved(arguments: list[str]) -> str:
    """Return what `--cfg job` prints, as yaml. Raises: ConfigError for another word after `--cfg`."""
    at = arguments.index("--cfg")
    if arguments[at + 1 : at + 2] != ["job"]:
        raise ConfigError("--cfg prints the resolved configuration", expected="--cfg job")
    return to_yaml(compose([*arguments[:at], *arguments[at + 2 :]]).config)

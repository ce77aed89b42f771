"""`python -m apollo_sft key=value …`, and what `torchrun -m apollo_sft` runs on every rank."""

from __future__ import annotations

import os
import sys

from apollo_sft.config.checks import check_paths
from apollo_sft.config.compose import YAML_PATH, Composed, compose, to_yaml
from apollo_sft.errors import ApolloError, CheckpointError, ConfigError

USAGE = """Train: python -m apollo_sft key=value …
       torchrun --standalone --nnodes=1 --nproc_per_node=N -m apollo_sft key=value …
       apollo-sft train [--nproc N] key=value …   starts one process per GPU by itself

  --help     this text
  --cfg job  print the resolved configuration and stop

Every key, its default and its meaning:
"""
INTERRUPTED = 130


def main(arguments: list[str]) -> int:
    """Run one rank. Returns the exit code: 0 done, 1 failed, 2 refused."""
    if "--help" in arguments or "-h" in arguments:
        _say(USAGE + "\n" + YAML_PATH.read_text(encoding="utf-8"))
        return 0
    try:
        composed = check(arguments)
        if composed is None:
            return 0
        from apollo_sft.train.run import train

        train(composed.config, composed.overridden, composed.notes)
    except ApolloError as error:
        _report(error)
        return error.exit_code
    except KeyboardInterrupt:
        if _rank() == 0:
            print("apollo-sft: interrupted", file=sys.stderr)
        return INTERRUPTED
    return 0


def check(arguments: list[str]) -> Composed | None:
    """The composed config, refused before torch is imported if it cannot run; None when it was only to be printed.

    Raises: ConfigError.
    """
    if "--cfg" in arguments:
        at = arguments.index("--cfg")
        if arguments[at + 1 : at + 2] != ["job"]:
            raise ConfigError("--cfg prints the resolved configuration", expected="--cfg job")
        _say(to_yaml(compose([*arguments[:at], *arguments[at + 2 :]]).config).rstrip())
        return None
    composed = compose(arguments)
    check_paths(composed.config, set(composed.overridden))
    return composed


def _say(text: str) -> None:
    if _rank() != 0:
        return
    try:
        print(text, flush=True)
    except BrokenPipeError:  # `--help | head`: the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _report(error: ApolloError) -> None:
    """One message a host: what is wrong with config, data or model stops its ranks alike.

    A file that cannot be written may be one rank's own trouble, so that rank says it too.
    """
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"apollo-sft: {error}", file=sys.stderr)
    elif isinstance(error, CheckpointError):
        print(f"apollo-sft: rank {_rank()}: {error}", file=sys.stderr)


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


def run() -> None:
    code = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        os._exit(code)  # threads of the process group may abort the interpreter while it shuts down
    sys.exit(code)


if __name__ == "__main__":
    run()

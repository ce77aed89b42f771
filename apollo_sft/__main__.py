"""`python -m apollo_sft key=value …`, and what `torchrun -m apollo_sft` runs on every rank."""

from __future__ import annotations

import os
import sys

from apollo_sft.config.checks import check_paths
from apollo_sft.config.compose import YAML_PATH, Composed, compose, to_yaml
from apollo_sft.errors import ApolloError

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
        print(USAGE + "\n" + YAML_PATH.read_text(encoding="utf-8"))
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
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    return 0


def check(arguments: list[str]) -> Composed | None:
    """The composed config, refused before torch is imported if it cannot run; None when it was only to be printed.

    Raises: ConfigError.
    """
    if "--cfg" in arguments:
        at = arguments.index("--cfg")
        print(to_yaml(compose([*arguments[:at], *arguments[at + 2 :]]).config), end="")
        return None
    composed = compose(arguments)
    check_paths(composed.config, set(composed.overridden))
    return composed


def _report(error: ApolloError) -> None:
    """One message a host: what stops one rank stops its neighbours alike."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"apollo-sft: {error}", file=sys.stderr)


def run() -> None:
    code = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        os._exit(code)  # threads of the process group may abort the interpreter while it shuts down
    sys.exit(code)


if __name__ == "__main__":
    run()

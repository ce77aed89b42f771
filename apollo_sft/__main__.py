"""`python -m apollo_sft key=value …`, and what `torchrun -m apollo_sft` runs on every rank."""

from __future__ import annotations

import os
import sys

from apollo_sft.cli.job import compose_job
from apollo_sft.errors import ApolloError, Stopped
from apollo_sft.parallel import failure
from apollo_sft.train.signals import StopFlag, end_with_parent

INTERRUPTED = 130


def main(arguments: list[str]) -> int:
    """Run one rank, and return the exit code.

    0: done, 1: failed, 2: refused, 3: trained but not uploaded, 75: stopped by a signal with the state saved.

    Raises: SystemExit with that code on a rank that leaves it to another one to say why.
    """
    try:
        with StopFlag() as stop:
            composed = compose_job(arguments)
            if composed is not None:
                from apollo_sft.train.run import train  # brings torch: what can be refused without it is refused by now

                train(composed.config, composed.overridden, composed.notes, stop)
        return 0
    except (ApolloError, Stopped) as error:
        code = error.exit_code
        has_reported = failure.report(error)
    except KeyboardInterrupt:
        code = INTERRUPTED
        has_reported = failure.report_interrupt()
    except Exception as error:
        code = 1
        has_reported = failure.report_unexpected(error)

    if not has_reported:
        raise SystemExit(code)
    return code


def run() -> None:
    """Run this rank as the program. Never returns."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        end_with_parent()
    try:
        code = main(sys.argv[1:])
    except SystemExit as silent:
        failure.leave(int(silent.code or 0), silent=True)
    failure.leave(code, silent=False)


if __name__ == "__main__":
    run()

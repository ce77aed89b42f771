"""Run torchrun for `apollo-sft train`: the ranks report what happened, and their exit code is ours.

torchrun itself prints a page about the failure of a rank, and ends with 1 whatever the rank's code was. On a signal it
would kill ranks that need more than its timeout to save; here they get the signal and take the time that they need.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from pathlib import Path
from types import FrameType

from apollo_sft.errors import Preempted
from apollo_sft.train.signals import SIGNALS, end_with_parent


class Passed:
    """Passes signals on to the ranks. `numbers`: those that came."""

    def __init__(self) -> None:
        self.numbers: list[int] = []
        for number in (*SIGNALS, signal.SIGHUP):
            signal.signal(number, self._pass_on)

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        del frame
        self.numbers.append(number)
        ranks = running_ranks()
        if not ranks:
            raise SystemExit(Preempted.exit_code)
        for pid in ranks:
            os.kill(pid, number)


def running_ranks() -> list[int]:
    """Return the ranks: of our child processes those that lead a session, which torchrun starts for every rank."""
    pids: list[int] = []
    for task in Path("/proc/self/task").iterdir():
        pids += map(int, (task / "children").read_text().split())
    return [pid for pid in pids if os.getsid(pid) == pid]


def main(arguments: list[str]) -> int:
    """Run torchrun with its arguments. Return the exit code of the rank that failed first, 1 when it was killed."""
    end_with_parent()
    passed = Passed()
    # From here on signals are passed on; importing torch takes seconds.
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import get_args_parser, run

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    try:
        run(get_args_parser().parse_args(["--signals-to-handle=SIGQUIT", *arguments]))  # type: ignore[no-untyped-call]
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode > 0:
            return int(failure.exitcode)
        if -failure.exitcode in passed.numbers and -failure.exitcode in SIGNALS:
            return Preempted.exit_code  # its handler was not installed yet: nothing had begun
        print(f"apollo-sft: rank {rank} was ended by {signal.Signals(-failure.exitcode).name}", file=sys.stderr)
        return 1

    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

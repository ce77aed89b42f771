"""torchrun, as `apollo-sft train` starts it: the ranks say what happened, and their exit code is ours.

torchrun itself prints a page about the failure of a rank, and ends with 1 whatever the rank's code was.
"""

from __future__ import annotations

import logging
import signal
import sys

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import get_args_parser, run


def main(arguments: list[str]) -> int:
    """`arguments` are torchrun's. Returns the exit code of the rank that failed first, 1 when it was killed."""
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    try:
        run(get_args_parser().parse_args(arguments))  # type: ignore[no-untyped-call]
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode > 0:
            return int(failure.exitcode)
        print(f"apollo-sft: rank {rank} was ended by {signal.Signals(-failure.exitcode).name}", file=sys.stderr)
        return 1
    except SignalException as error:
        print(f"apollo-sft: ended by {signal.Signals(error.sigval).name}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

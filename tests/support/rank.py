"""One rank of `tests.support.ranks.run_on_ranks`: hears what to do, does it, and says what came of it."""

from __future__ import annotations

import gc
import os
import pickle
import sys
import traceback
from multiprocessing.connection import Connection

from apollo_sft.parallel import launch


def main(descriptor: int) -> None:
    """Answer (True, what the function returned) or (False, the traceback)."""
    asked = Connection(descriptor)
    function, needs_group, arguments = asked.recv()

    try:
        world = launch.start("cpu", needs_group=needs_group)
        answer = (True, function(world, *arguments))
    except Exception:
        answer = (False, traceback.format_exc())

    asked.send_bytes(pickle.dumps(answer))  # tensors as values: `send` would share memory that ends with this process
    asked.recv()  # all ranks have answered: none is lost by the others while they still talk
    gc.collect()
    launch.stop()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # as the program itself: threads of the process group may abort a slow end


if __name__ == "__main__":
    main(int(sys.argv[1]))

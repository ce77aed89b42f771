"""Call a function of a test's file on N gloo ranks, and collect what it returned on each."""

import multiprocessing
import multiprocessing.connection
import os
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from torch.distributed import TCPStore

from tests.support import python

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT_SECONDS = 300
PATIENCE_SECONDS = 60
"""For a rank that has answered, to end."""

OTHERS_SECONDS = 3
"""For the other ranks to say what they met, when one has failed."""


class RankError(Exception):
    """Some ranks failed. Its text has their tracebacks."""


def run_on_ranks(
    function: Callable[..., Any],
    size: int,
    *arguments: Any,
    needs_group: bool = False,
    seconds: float = TIMEOUT_SECONDS,
) -> list[Any]:
    """Call `function(world, *arguments)` on `size` gloo ranks; what it returned, by rank. It may take `seconds`.

    The function is one of a module: every rank imports the test's file under the name that pytest gives it.
    Raises: RankError with the traceback of every rank that failed.
    """
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # the port is taken, no other run gets it
    talks, processes = [], []
    try:
        for rank in range(size):
            ours, theirs = multiprocessing.Pipe()
            processes.append(_start_rank(rank, size, store.port, theirs.fileno()))
            theirs.close()
            talks.append(ours)
            ours.send((function, needs_group, arguments))

        answers = _answers(talks, time.monotonic() + seconds)
        failures = [f"rank {rank}:\n{answers[rank][1]}" for rank in sorted(answers) if not answers[rank][0]]
        if failures:
            raise RankError("\n".join(failures))
        if len(answers) < size:
            raise RankError(f"after {seconds} s only the ranks {sorted(answers)} of {size} had answered")

        for talk in talks:
            talk.send("all have answered")
        codes = [process.wait(PATIENCE_SECONDS) for process in processes]
        assert codes == [0] * size
    finally:
        for process in processes:
            process.kill()
            process.wait()
        for talk in talks:
            talk.close()
    return [answers[rank][1] for rank in range(size)]


def _start_rank(rank: int, size: int, port: int, descriptor: int) -> python.Process:
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_PORT": port}
    of_agent = {"MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
    environment = {name: str(value) for name, value in place.items()} | of_agent | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.support.rank", str(descriptor)]
    return python.start(command, cwd=ROOT, env=os.environ | environment, pass_fds=[descriptor])


def _answers(talks: list[Connection], deadline: float) -> dict[int, tuple[bool, Any]]:
    """What the ranks said by then. After a first failure the others have a moment only: they may wait for that one."""
    answers: dict[int, tuple[bool, Any]] = {}
    waiting = dict(zip(talks, range(len(talks)), strict=True))
    while waiting and (left := deadline - time.monotonic()) > 0:
        for talk in multiprocessing.connection.wait(list(waiting), left):
            rank = waiting.pop(talk)
            answers[rank] = _heard(talk)
            if not answers[rank][0]:
                deadline = min(deadline, time.monotonic() + OTHERS_SECONDS)
    return answers


def _heard(talk: Connection) -> tuple[bool, Any]:
    try:
        answer: tuple[bool, Any] = talk.recv()
    except (EOFError, ConnectionError):
        return False, "it ended without a word"
    return answer

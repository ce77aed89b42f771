"""Trainings on several ranks as a cluster starts them that has no torchrun: plain processes, told who they are."""

import os
import socket
import subprocess
import sys
from pathlib import Path

from tests.support import python
from tests.support.runs import arguments

PATIENCE_SECONDS = 240


def train_on_ranks(inputs: Path, out: Path, size: int, *more: str) -> list[int]:
    """One training as `tests.support.runs` describes it, on `size` gloo ranks; their exit codes, 0 for done.

    What rank 0 says lies in `ranks.log` beside the folder.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    command = [sys.executable, "-m", "apollo_sft", *arguments(inputs, out, *more)]
    with (out.parent / "ranks.log").open("a") as log:
        ranks = [
            python.start(command, env=os.environ | place(rank, size, port), stdout=log, stderr=log)
            for rank in range(size)
        ]
    for rank in ranks:
        try:
            rank.wait(PATIENCE_SECONDS)
        except subprocess.TimeoutExpired:
            rank.kill()
    return [rank.wait() for rank in ranks]


def place(rank: int, size: int, port: int) -> dict[str, str]:
    """The variables that say who a rank is; none for one alone."""
    if size == 1:
        return {}
    of_rank = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_PORT": port}
    return {name: str(value) for name, value in of_rank.items()} | {"MASTER_ADDR": "127.0.0.1"}

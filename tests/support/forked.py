"""Trainings on several ranks without starting Python anew: a server that has imported everything forks the ranks."""

import multiprocessing
import os
import socket
import sys
from pathlib import Path

PATIENCE_SECONDS = 240


def train_on_ranks(inputs: Path, out: Path, size: int, *more: str) -> list[int]:
    """One training as `tests.support.runs` describes it, on `size` gloo ranks; their exit codes, 0 for done.

    What rank 0 says lies in `ranks.log` beside the folder.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["apollo_sft.train.run", "tests.support.runs", "peft", "transformers.models.qwen2"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = [
        context.Process(target=_rank, args=(rank, size, port, str(inputs), str(out), more)) for rank in range(size)
    ]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(PATIENCE_SECONDS)
        if rank.is_alive():
            rank.kill()
            rank.join()
    return [rank.exitcode if rank.exitcode is not None else -1 for rank in ranks]


def _rank(rank: int, size: int, port: int, inputs: str, out: str, more: tuple[str, ...]) -> None:
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_PORT": port}
    if size > 1:
        os.environ.update({name: str(value) for name, value in place.items()} | {"MASTER_ADDR": "127.0.0.1"})
    log = os.open(Path(out).parent / "ranks.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    from apollo_sft.__main__ import main
    from tests.support.runs import arguments

    code = 1
    try:
        code = main(arguments(Path(inputs), Path(out), *more))
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # as the program itself: threads of the process group may abort a slow end

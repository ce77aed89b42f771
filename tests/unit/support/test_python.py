"""The fork server of the tests: a forked command is what a started one is, but for the seconds of imports."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from apollo_sft.parallel.consensus import sum_over_ranks
from apollo_sft.parallel.launch import World
from tests.support import processes, python
from tests.support.ranks import RankError, run_on_ranks

SHOW = """
import json, os, signal, sys

def value(number):
    handler = signal.getsignal(number)
    return getattr(handler, "__name__", None) or signal.Handlers(handler).name

print(json.dumps({
    "arguments": sys.argv[1:],
    "argument 0": sys.argv[0],
    "descriptors": sorted(os.listdir("/proc/self/fd"))[:3],
    "buffers": [sys.stdout.line_buffering, sys.stdout.write_through],
    "encoding": [sys.stdout.encoding, sys.stdout.errors, sys.stderr.errors],
    "folder": os.getcwd(),
    "handlers": {number.name: value(number) for number in signal.Signals if number.name.startswith("SIG")},
    "is a leader": os.getsid(0) == os.getpid(),
    "name": __name__,
    "parent": os.getppid(),
    "original": sys.orig_argv,
    "path": [entry for entry in sys.path if "site-packages" not in entry and "__editable__" not in entry],
    "variables": dict(os.environ),
}))
sys.exit(7)
"""


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    """A module of a folder of its own, under a name that is forked."""
    (tmp_path / "apollo_sft_shows.py").write_text(SHOW)
    return [sys.executable, "-m", "apollo_sft_shows", "a=1", "ä b"]


@pytest.mark.parametrize(
    ("line", "in_session"),
    [
        (["-m", "apollo_sft_shows"], False),
        (["-m", "apollo_sft_shows"], True),
        (["-u", "-m", "apollo_sft_shows"], True),
        (["-c", SHOW], False),
        (["apollo_sft_shows.py"], False),
    ],
    ids=["module", "session", "unbuffered", "code", "file"],
)
def test_it_is_what_a_started_process_is(command: list[str], tmp_path: Path, line: list[str], in_session: bool) -> None:
    command = [command[0], *line, *command[3:]]
    how = {"cwd": tmp_path, "capture_output": True, "text": True, "start_new_session": in_session}
    how["env"] = {name: value for name, value in os.environ.items() if name != "HOME"} | {"MINE": "ü=1"}
    started = subprocess.run(command, **how)
    forked = python.run(command, **how)
    assert started.returncode == 7
    assert (forked.returncode, forked.stderr) == (7, started.stderr)
    assert json.loads(forked.stdout) == json.loads(started.stdout)


def test_it_can_be_killed_and_found_by_its_variables(command: list[str], tmp_path: Path) -> None:
    (tmp_path / "apollo_sft_shows.py").write_text("import time\nprint('here', flush=True)\ntime.sleep(1000)")
    variables = os.environ | {"RANK": "3"}

    with python.start(command, cwd=tmp_path, env=variables, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "here\n"
        assert process.pid in processes.descendants(os.getpid())
        assert processes.ranks(os.getpid())[3] == process.pid
        process.send_signal(signal.SIGTERM)
        assert process.wait() == -signal.SIGTERM


def test_what_it_starts_is_its_child(command: list[str], tmp_path: Path) -> None:
    """And hears of its end, as torchrun's ranks do."""
    (tmp_path / "apollo_sft_shows.py").write_text(
        "import os, subprocess, sys\n"
        "from apollo_sft.train.signals import end_with_parent\n"
        "if sys.argv[1] == 'below':\n"
        "    end_with_parent()\n"
        "    print(os.getpid(), os.getppid(), flush=True)\n"
        "    sys.stdin.read()\n"
        "subprocess.run([sys.executable, '-m', 'apollo_sft_shows', 'below'])\n"
    )

    ends = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with python.start(command, cwd=tmp_path, **ends) as process:
        below, parent = map(int, process.stdout.readline().split())
        assert parent == process.pid
        process.kill()
        assert processes.wait_until_gone([below], 60) == []


@pytest.mark.parametrize("variable", ["HF_HOME", "OMP_NUM_THREADS", "PYTHONHASHSEED"])
def test_what_is_read_at_a_start_has_one_of_its_own(command: list[str], tmp_path: Path, variable: str) -> None:
    """The memory of a forked process has the server's modules in it."""
    (tmp_path / "apollo_sft_shows.py").write_text("import sys\nprint('torch' in sys.modules)")
    how = {"cwd": tmp_path, "capture_output": True, "text": True}
    assert python.run(command, **how).stdout == "True\n"
    assert python.run(command, env=os.environ | {variable: "3"}, **how).stdout == "False\n"


def test_nothing_has_been_computed_in_the_server(command: list[str], tmp_path: Path) -> None:
    """A thread does not live on in a fork, and what waits for it waits for ever. Arrow's allocator starts its own."""
    (tmp_path / "apollo_sft_shows.py").write_text("")
    assert python.run(command, cwd=tmp_path).returncode == 0
    servers = [pid for pid in processes.descendants(os.getpid()) if is_server(pid)]
    assert len(servers) == 1
    tasks = Path(f"/proc/{servers[0]}/task").iterdir()
    names = {(task / "comm").read_text().strip() for task in tasks if task.name != str(servers[0])}
    assert names <= {"jemalloc_bg_thd"}


def is_server(pid: int) -> bool:
    return b"tests.support.fork_server" in Path(f"/proc/{pid}/cmdline").read_bytes()


def everyone(world: World, values: list[float]) -> tuple[int, torch.Tensor]:
    return world.rank, sum_over_ranks(torch.tensor(values) * (1 + world.rank))


def test_a_function_of_this_file_runs_on_ranks() -> None:
    (rank, total), (other, same) = run_on_ranks(everyone, 2, [1.0, 5.0])
    assert (rank, other) == (0, 1)
    assert total.tolist() == same.tolist() == [3.0, 15.0]


def one_fails(world: World) -> None:
    if world.rank == 1:
        raise ValueError("the second one")
    sum_over_ranks(torch.zeros(1))


def test_the_traceback_of_a_rank_comes_to_the_test() -> None:
    with pytest.raises(RankError, match=r"rank 1:\n(?s:.)*in one_fails\n(?s:.)*ValueError: the second one"):
        run_on_ranks(one_fails, 2)


def one_ends(world: World) -> None:
    os._exit(world.rank)


def test_a_rank_that_ends_without_a_word_is_named() -> None:
    with pytest.raises(RankError, match="rank 1:\nit ended without a word"):
        run_on_ranks(one_ends, 2)

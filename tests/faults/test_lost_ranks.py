"""A rank that is killed, one that stands still, a launcher that dies: the job ends, and says who was lost."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support import python
from tests.support.data import write_parquet
from tests.support.processes import descendants, kill, ranks, wait_until_gone
from tests.support.reliability import record
from tests.support.runs import TIMEOUT_SECONDS, arguments, read_metrics, rows, status, write_inputs

PATIENCE_SECONDS = 120
SILENCE_SECONDS = 5
ENDLESS = "trainer.total_training_steps=1000000"
KEYS = ("data.val_files=null", f"trainer.collective_timeout_seconds={2 * SILENCE_SECONDS}")
SHUTDOWN_SECONDS = 30
"""How long torchrun waits for ranks that do not end before it kills them."""
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("inputs"))


def start(launcher: list[str], inputs: Path, out: Path, *more: str) -> "subprocess.Popen[str]":
    words = [*launcher, *arguments(inputs, out, *KEYS, *more)]
    log = out.with_suffix(".log").open("a")
    return python.start(words, stdout=log, stderr=log, text=True)


def by(name: str) -> list[str]:
    if name == "torchrun":
        return [*TORCHRUN, "--standalone", "--nproc_per_node=2", "-m", "apollo_sft"]
    return [sys.executable, "-m", "apollo_sft.cli.main", "train", "--nproc=2"]


def num_lines(out: Path) -> int:
    return len((out / "metrics.jsonl").read_text().splitlines()) if (out / "metrics.jsonl").exists() else 0


def wait_for(reached: Callable[[], bool], process: "subprocess.Popen[str]", out: Path) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not reached():
        assert process.poll() is None, said(out)
        assert time.monotonic() < deadline, said(out)
        time.sleep(0.02)


def said(out: Path) -> str:
    return out.with_suffix(".log").read_text()[-6000:]


@dataclass
class Ending:
    """How a job ended. `left`: processes of it that lived on."""

    code: int
    left: list[int]
    seconds: float


@dataclass
class Job:
    """A training of two ranks. `rank` was sent the signal `number`."""

    launcher: str
    rank: int
    number: signal.Signals
    out: Path
    ending: Future[Ending]


def lose_a_rank(
    inputs: Path, out: Path, pool: ThreadPoolExecutor, launcher: str, rank: int, number: signal.Signals
) -> Job:
    """Start a job and send one of its ranks the signal. A thread of the pool waits for the end."""
    process = start(by(launcher), inputs, out, ENDLESS)
    wait_for(lambda: num_lines(out) >= 2, process, out)
    everybody = [process.pid, *descendants(process.pid)]
    os.kill(ranks(process.pid)[rank], number)
    return Job(launcher, rank, number, out, pool.submit(wait_for_end, process, everybody))


def wait_for_end(process: "subprocess.Popen[str]", everybody: list[int]) -> Ending:
    began = time.monotonic()
    try:
        code = process.wait(timeout=TIMEOUT_SECONDS)
    finally:
        left = wait_until_gone(everybody, 5)
        kill(left)
    return Ending(code, left, time.monotonic() - began)


def check_that_it_ended(job: Job) -> None:
    ending, rank = job.ending.result(), job.rank
    silence = SILENCE_SECONDS if job.number == signal.SIGSTOP else 0
    named = {
        signal.SIGSTOP: rf"rank {rank} on \S+ does not respond: it sent no heartbeat for {SILENCE_SECONDS} s",
        signal.SIGKILL: rf"rank {rank} was ended by SIGKILL|rank {1 - rank} on \S+: lost another rank",
    }[job.number]
    wrong = [] if ending.code == 1 else [f"exit code {ending.code}"]
    wrong += [] if re.search(named, said(job.out)) else ["it is not named"]
    wrong += [f"{len(ending.left)} processes lived on"] if ending.left else []
    wrong += [] if status(job.out) == "failed" or job.launcher == "torchrun" else [f"run.json says {status(job.out)}"]
    name = f"{job.number.name} of rank {rank} of 2 by {job.launcher}, silence {silence} s"
    record(name, trials=1, failures=int(bool(wrong)), worst_seconds=ending.seconds)
    assert not wrong, said(job.out)
    assert ending.seconds < 2 * silence + SHUTDOWN_SECONDS + 30, "half a minute is left for a busy machine"


@pytest.fixture(scope="module")
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor() as pool:
        yield pool


@pytest.fixture(scope="module")
def stopped(inputs: Path, tmp_path_factory: pytest.TempPathFactory, pool: ThreadPoolExecutor) -> Job:
    """A job whose rank 1 is stopped. The tests that ask for it first use the time that torchrun waits for that rank."""
    return lose_a_rank(inputs, tmp_path_factory.mktemp("stopped") / "out", pool, "apollo-sft", 1, signal.SIGSTOP)


@pytest.mark.parametrize(
    ("launcher", "rank", "number"),
    [
        ("apollo-sft", 1, signal.SIGKILL),
        pytest.param("apollo-sft", 0, signal.SIGKILL, marks=pytest.mark.long),
        pytest.param("apollo-sft", 0, signal.SIGSTOP, marks=pytest.mark.long),
        pytest.param("torchrun", 0, signal.SIGKILL, marks=pytest.mark.long),
        pytest.param("torchrun", 1, signal.SIGSTOP, marks=pytest.mark.long),
    ],
)
@pytest.mark.usefixtures("stopped")
def test_a_lost_rank_ends_the_job_and_is_named(
    inputs: Path, tmp_path: Path, pool: ThreadPoolExecutor, launcher: str, rank: int, number: signal.Signals
) -> None:
    check_that_it_ended(lose_a_rank(inputs, tmp_path / "out", pool, launcher, rank, number))


NEVER_COMES = """
import os, time
from torch.optim.optimizer import register_optimizer_step_pre_hook

steps = 0

def wait_for_ever(optimizer, args, kwargs):
    global steps
    steps += 1
    while os.environ["RANK"] == {rank!r} and steps == 3:
        time.sleep(3600)

register_optimizer_step_pre_hook(wait_for_ever)
"""


@pytest.mark.parametrize("rank", [1, pytest.param(0, marks=pytest.mark.long)])
@pytest.mark.usefixtures("stopped")
def test_a_rank_that_lives_but_never_comes_is_named(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rank: int
) -> None:
    """Signs of life go on: only where each rank stands tells who is missing."""
    (tmp_path / "never_comes.py").write_text(NEVER_COMES.format(rank=str(rank)))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    out = tmp_path / "out"
    process = start(by("apollo-sft"), inputs, out, ENDLESS, "model.external_lib=never_comes")
    wait_for(lambda: num_lines(out) >= 2, process, out)
    began = time.monotonic()
    code = process.wait(timeout=TIMEOUT_SECONDS)
    seconds = time.monotonic() - began
    named = (
        rf"no step has ended for {SILENCE_SECONDS} s; rank {rank} on \S+: in wait_for_ever \(\S+never_comes\.py:\d+\)"
    )
    wrong = [] if code == 1 else [f"exit code {code}"]
    wrong += [] if re.search(named, said(out)) else ["it is not named"]
    before = said(out).rpartition("a collective timed out (trainer.collective_timeout_seconds)")[0]
    wrong += [] if f"rank {1 - rank} on" in before else ["not said"]
    wrong += [] if status(out) == "failed" else [f"run.json says {status(out)}"]
    name = f"rank {rank} of 2 lives but never comes to a collective, timeout {2 * SILENCE_SECONDS} s"
    record(name, trials=1, failures=int(bool(wrong)), worst_seconds=seconds)
    assert not wrong, said(out)
    assert seconds < 3 * SILENCE_SECONDS + SHUTDOWN_SECONDS + 30, "half a minute is left for a busy machine"


@pytest.mark.parametrize("launcher", ["apollo-sft", pytest.param("torchrun", marks=pytest.mark.long)])
def test_ranks_end_with_their_launcher(inputs: Path, tmp_path: Path, launcher: str) -> None:
    out = tmp_path / "out"
    process = start(by(launcher), inputs, out, ENDLESS)
    wait_for(lambda: num_lines(out) >= 1, process, out)
    below = descendants(process.pid)
    process.kill()
    began = time.monotonic()
    process.wait()
    left = wait_until_gone(below, 20)
    seconds = time.monotonic() - began
    kill(left)
    record(f"SIGKILL of {launcher}, 2 ranks", trials=1, failures=int(bool(left)), worst_seconds=seconds)
    assert len(below) >= 2
    assert not left


def test_a_stopped_rank_ends_the_job_and_is_named(stopped: Job) -> None:
    check_that_it_ended(stopped)


@pytest.mark.long
def test_torchrun_starts_again_after_a_lost_rank(inputs: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    steps = 60
    launcher = [*TORCHRUN, "--standalone", "--nproc_per_node=2", "--max-restarts=2", "-m", "apollo_sft"]
    began = time.monotonic()
    process = start(launcher, inputs, out, f"trainer.total_training_steps={steps}", "trainer.save_freq=2")
    for after in (4, 20):
        wait_for(lambda after=after: num_lines(out) >= after, process, out)  # type: ignore[misc]
        os.kill(ranks(process.pid)[1], signal.SIGKILL)
    code = process.wait(timeout=TIMEOUT_SECONDS)
    failed = code != 0 or [line["step"] for line in read_metrics(out)] != list(range(1, steps + 1))
    record(
        "torchrun --max-restarts=2, a rank killed twice",
        trials=1,
        failures=int(failed),
        worst_seconds=time.monotonic() - began,
    )
    assert not failed, said(out)
    assert out.with_suffix(".log").read_text().count("resuming the run") == 2
    assert status(out) == "finished"


@pytest.mark.long
def test_a_node_that_is_lost_leaves_the_others_training(inputs: Path, tmp_path: Path) -> None:
    """Two agents with one rank each; one is killed with its rank, the other goes on alone."""
    out = tmp_path / "out"
    steps = 200
    keys = [f"trainer.total_training_steps={steps}", "trainer.save_freq=2"]
    port = str(29500 + os.getpid() % 1000)
    how = ["--nnodes=1:2", "--nproc_per_node=1", "--max-restarts=3", "--rdzv_backend=c10d", "--rdzv_id=lost"]
    conf = "--rdzv_conf=join_timeout=60,last_call_timeout=5,keep_alive_interval=1,keep_alive_max_attempt=3,is_host="
    agents = [
        start(
            [*TORCHRUN, *how, f"--rdzv_endpoint=127.0.0.1:{port}", f"{conf}{int(i == 0)}", "-m", "apollo_sft"],
            inputs,
            out,
            *keys,
        )
        for i in range(2)
    ]
    try:
        wait_for(lambda: num_lines(out) >= 4, agents[0], out)
        assert json.loads((out / "run.json").read_text())["processes"] == 2
        began = time.monotonic()
        kill([agents[1].pid, *descendants(agents[1].pid)])
        code = agents[0].wait(timeout=TIMEOUT_SECONDS)
    finally:
        kill([pid for agent in agents for pid in (*descendants(agent.pid), agent.pid)])
    failed = code != 0 or [line["step"] for line in read_metrics(out)] != list(range(1, steps + 1))
    record(
        "torchrun --nnodes=1:2, one of two hosts killed",
        trials=1,
        failures=int(failed),
        worst_seconds=time.monotonic() - began,
    )
    assert not failed, said(out)
    assert json.loads((out / "run.json").read_text())["processes"] == 1


@pytest.mark.long
def test_preparing_may_take_longer_than_the_timeout(inputs: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    write_parquet(tmp_path / "many.parquet", rows(30_000))
    more = [f"data.train_files={tmp_path / 'many.parquet'}", f"data.store_dir={tmp_path / 'store'}"]
    more += ["trainer.collective_timeout_seconds=3", "trainer.total_training_steps=2"]
    process = start(by("apollo-sft"), inputs, out, *more)
    assert process.wait(timeout=TIMEOUT_SECONDS) == 0, said(out)
    seconds = float(re.findall(r"tokenised 30,000 train rows in ([\d.]+) s", said(out))[0])
    assert seconds > 3, "more rows are needed to prove anything"

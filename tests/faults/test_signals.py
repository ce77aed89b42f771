"""SIGTERM, SIGINT and SIGUSR1 in every phase of a run: it stops, says so, and the same command finishes it."""

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from apollo_sft.checkpoint.publish import STAGING_PREFIX, model_files
from apollo_sft.errors import Preempted
from tests.support import python
from tests.support.data import write_parquet
from tests.support.processes import ranks
from tests.support.reliability import record
from tests.support.runs import TIMEOUT_SECONDS, arguments, read_metrics, rows, status, write_inputs

PATIENCE_SECONDS = 120
STEPS = 4
LARGER = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 4}
"""So that a save takes long enough to be met."""
MANY = 12_000
"""Rows that take seconds to tokenise."""
VALIDATION = 250
"""Rows that take seconds to validate, one by one."""
FOUR_AT_ONCE = "data.micro_batch_size_per_gpu=4"
"""So that the run that goes on validates them sooner."""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_inputs(tmp_path_factory.mktemp("inputs"), **LARGER)
    write_parquet(folder / "many.parquet", rows(MANY))
    write_parquet(folder / "validation.parquet", rows(VALIDATION, seed=1))
    return folder


def train(inputs: Path, out: Path, processes: int, *more: str, starts: Any = python.start) -> "subprocess.Popen[str]":
    words = arguments(inputs, out, f"trainer.total_training_steps={STEPS}", *more)
    command = [sys.executable, "-m", "apollo_sft.cli.main", "train", f"--nproc={processes}", *words]
    process: subprocess.Popen[str] = starts(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return process


def num_lines(out: Path) -> int:
    return len((out / "metrics.jsonl").read_text().splitlines()) if (out / "metrics.jsonl").exists() else 0


def is_there(folder: Path, pattern: str) -> bool:
    return folder.is_dir() and any(folder.glob(pattern))


def listens(pid: int) -> bool:
    """Whether all ranks below a process, or itself, have begun to catch signals."""
    found = list(ranks(pid).values()) or [pid]
    masks = [re.findall(r"SigCgt:\s*(\w+)", Path(f"/proc/{each}/status").read_text()) for each in found]
    return all(int(mask, 16) >> (signal.SIGUSR1 - 1) & 1 for (mask,) in masks)


MANY_ROWS = "data.train_files={inputs}/many.parquet"
PHASES: dict[str, tuple[list[str], Callable[[Path], bool]]] = {
    "it imports": ([], lambda out: True),
    "it tokenises": ([MANY_ROWS], lambda out: is_there(out.parent / "store", ".building-*")),
    "it loads the model": ([], lambda out: (out / "data_audit.json").exists()),
    "it trains": (["trainer.total_training_steps=1000000"], lambda out: num_lines(out) >= 2),
    "it validates": (
        ["data.val_files={inputs}/validation.parquet", "data.micro_batch_size_per_gpu=1", "trainer.test_freq=3"],
        lambda out: num_lines(out) == 2,
    ),
    "it saves": (["trainer.save_freq=1"], lambda out: is_there(out / "checkpoints", f"{STAGING_PREFIX}step_*")),
    "it saves in the background": (
        ["trainer.save_freq=1", "trainer.checkpoint.async_save=true"],
        lambda out: is_there(out / "checkpoints", f"{STAGING_PREFIX}step_*"),
    ),
    "it writes the model": ([], lambda out: is_there(out, f"{STAGING_PREFIX}model*")),
}
"""(overrides, whether the run of this folder is there now)."""


def wait_for(process: "subprocess.Popen[str]", reached: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not reached():
        assert process.poll() is None, process.communicate()[1][-4000:]
        if time.monotonic() > deadline:
            process.terminate()
            raise AssertionError(process.communicate()[1][-4000:])
        time.sleep(0.002)


def said_at_the_end(process: "subprocess.Popen[str]") -> str:
    try:
        return process.communicate(timeout=TIMEOUT_SECONDS)[1]
    finally:
        process.kill()


QUICK = {
    ("SIGTERM", "it imports", 2),
    ("SIGINT", "it tokenises", 2),
    ("SIGUSR1", "it loads the model", 1),
    ("SIGTERM", "it trains", 1),
    ("SIGUSR1", "it validates", 2),
    ("SIGTERM", "it saves", 1),
    ("SIGINT", "it writes the model", 2),
}
"""Every signal and every phase once; all others are long tests."""
CASES = [
    pytest.param(*case, marks=[] if case in QUICK else [pytest.mark.long], id=f"{case[0]} while {case[1]}, {case[2]}")
    for case in [(name, phase, n) for phase in PHASES for name in ("SIGTERM", "SIGINT", "SIGUSR1") for n in (1, 2)]
]


@pytest.mark.parametrize(("name", "phase", "processes"), CASES)
def test_a_signal_in_any_phase(inputs: Path, tmp_path: Path, name: str, phase: str, processes: int) -> None:
    out = tmp_path / "out"
    more, reached = PHASES[phase]
    more = [f"data.store_dir={tmp_path / 'store'}", *(text.format(inputs=inputs) for text in more)]
    if phase != "it validates":
        more.append("data.val_files=null")
    starts = subprocess.Popen if phase == "it imports" else python.start  # what is forked imports nothing
    process = train(inputs, out, processes, *more, starts=starts)
    wait_for(process, lambda: listens(process.pid))
    wait_for(process, lambda: reached(out))
    if phase == "it validates":
        time.sleep(0.5)  # the third step is over in less
    began = time.monotonic()
    process.send_signal(signal.Signals[name])
    said = said_at_the_end(process)
    seconds = time.monotonic() - began
    wrong = what_is_wrong(process.returncode, said, out, name)
    where = "1 process" if processes == 1 else f"{processes} processes"
    record(f"{name} while {phase}, {where}", trials=1, failures=int(bool(wrong)), worst_seconds=seconds)
    assert not wrong, f"{wrong}\n{said[-4000:]}"
    if phase in ("it trains", "it saves", "it saves in the background"):
        newest = max(path.name for path in (out / "checkpoints").glob("step_*"))
        assert f"step_{num_lines(out):06}" == newest
    if phase in ("it validates", "it saves", "it writes the model"):
        check_that_it_goes_on(train(inputs, out, processes, *more, FOUR_AT_ONCE), out, phase)


def what_is_wrong(code: int, said: str, out: Path, name: str) -> list[str]:
    """Whether a run did not stop as it should."""
    wrong = []
    if code != Preempted.exit_code:
        wrong.append(f"exit code {code}")
    if (out / "run.json").exists() and status(out) != "preempted":
        wrong.append(f"run.json says {status(out)}")
    if "Traceback" in said:
        wrong.append("a traceback")
    expected = {1} if (out / "run.json").exists() else {0, 1}  # before a rank has begun there is nobody to say it
    if said.count(f"apollo-sft: stopped by {name} ") not in expected:
        wrong.append("it is not said once")
    if model_files(out):
        wrong.append("there is a model")
    return wrong


def check_that_it_goes_on(process: "subprocess.Popen[str]", out: Path, phase: str) -> None:
    said = said_at_the_end(process)
    assert process.returncode == 0, said[-4000:]
    assert status(out) == "finished"
    metrics = read_metrics(out)
    assert [line["step"] for line in metrics] == list(range(1, STEPS + 1))
    assert all("train/loss" in line for line in metrics)
    if phase == "it validates":
        assert ["val/loss" in line for line in metrics] == [False, False, True, True]
        validated = [json.loads((folder / "state.json").read_text()) for folder in (out / "checkpoints").glob("step_*")]
        assert [facts["unfinished"] for facts in validated if facts["step"] == STEPS] == [None]

"""0 done, 1 failed, 2 refused: the exit code of `apollo-sft train` and run.json say the same. 75 is in test_signals."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import python
from tests.support.runs import TIMEOUT_SECONDS, arguments, status, write_inputs

FAILING = """
import torch

step, calls = torch.optim.AdamW.step, []

def fails(self, *arguments, **named):
    calls.append(1)
    if len(calls) == 2:
        raise RuntimeError("the optimizer is on fire")
    return step(self, *arguments, **named)

torch.optim.AdamW.step = fails
"""
TABLE: dict[str, tuple[list[str], int, str]] = {
    "done": ([], 0, "finished"),
    "failed": (["model.external_lib=on_fire"], 1, "failed"),
    "refused": (["data.max_length=4"], 2, "refused"),
}
"""(overrides, exit code, status in run.json)."""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_inputs(tmp_path_factory.mktemp("inputs"))
    (folder / "on_fire.py").write_text(FAILING)
    return folder


def run(inputs: Path, out: Path, processes: int, *more: str) -> "subprocess.CompletedProcess[str]":
    words = arguments(inputs, out, "trainer.total_training_steps=3", "data.val_files=null", *more)
    command = [sys.executable, "-m", "apollo_sft.cli.main", "train", f"--nproc={processes}", *words]
    environment = os.environ | {"PYTHONPATH": f"{Path(__file__).resolve().parents[2]}:{inputs}"}
    return python.run(command, capture_output=True, text=True, env=environment, timeout=TIMEOUT_SECONDS, check=False)


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.long)])
@pytest.mark.parametrize("outcome", TABLE)
def test_the_exit_code_and_run_json_say_the_same(inputs: Path, tmp_path: Path, outcome: str, processes: int) -> None:
    more, code, expected = TABLE[outcome]
    finished = run(inputs, tmp_path / "out", processes, *more)
    assert (finished.returncode, status(tmp_path / "out")) == (code, expected), finished.stderr[-3000:]


@pytest.mark.long
@pytest.mark.parametrize("processes", [1, 2])
def test_a_second_start_leaves_the_status_of_a_finished_run(inputs: Path, tmp_path: Path, processes: int) -> None:
    out = tmp_path / "out"
    for more, code in (([], 0), ([], 0), (["optim.lr=1e-3"], 2)):
        finished = run(inputs, out, processes, *more)
        assert (finished.returncode, status(out)) == (code, "finished"), finished.stderr[-3000:]

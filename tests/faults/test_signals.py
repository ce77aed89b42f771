"""A polite signal ends a run between two steps: said, written down, and with nothing half done."""

import signal
import time
from pathlib import Path

import pytest

from apollo_sft.checkpoint.publish import model_files
from apollo_sft.errors import Preempted
from tests.support.runs import finish, read_metrics, start, status, write_inputs

PATIENCE_SECONDS = 120


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.mark.parametrize("name", ["SIGTERM", pytest.param("SIGINT", marks=pytest.mark.long)])
def test_a_signal_between_steps(inputs: Path, tmp_path: Path, name: str) -> None:
    out = tmp_path / "out"
    process = start(inputs, out, "trainer.total_training_steps=1000000", "data.val_files=null")
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not (out / "metrics.jsonl").exists() or len(read_metrics(out)) < 2:
        assert process.poll() is None, finish(process)[-4000:]
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(signal.Signals[name])
    said = finish(process)
    assert process.returncode == Preempted.exit_code, said[-4000:]
    last = read_metrics(out)[-1]["step"]
    assert f"apollo-sft: stopped by {name} after step {last}" in said
    assert "Traceback" not in said
    assert status(out) == "preempted"
    assert not model_files(out)

"""Kill a run, give the same command again: the finished run is bit-equal to one that was never stopped."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from apollo_sft.prepare.demo_model import write_base_model
from apollo_sft.prepare.word_problems import write_word_problems
from apollo_sft.report.metrics import read_metrics
from tests.support import python
from tests.support.processes import descendants, kill

STEPS = 9


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, and a model with dropout, so that random states matter."""
    folder = tmp_path_factory.mktemp("inputs")
    write_word_problems(folder / "data", 40, 8, seed=1)
    write_base_model(folder / "model", ["Ann has 3 pens. #### 3", "How many pens does Ann have?"] * 20, seed=1)
    config = folder / "model" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"attention_dropout": 0.1}))
    return folder


def command(inputs: Path, out: Path, processes: int, *more: str) -> list[str]:
    data = inputs / "data" / "single_turn"
    launcher = [sys.executable, "-m", "apollo_sft.cli.main", "train", f"--nproc={processes}"]
    return [
        *launcher,
        f"model.partial_pretrain={inputs / 'model'}",
        f"data.train_files={data / 'train.parquet'}",
        f"data.val_files={data / 'test.parquet'}",
        "data.prompt_key=extra_info",
        "data.response_key=extra_info",
        "data.train_batch_size=8",
        "data.micro_batch_size_per_gpu=4",
        "trainer.device=cpu",
        "trainer.test_freq=4",
        f"trainer.total_training_steps={STEPS}",
        f"trainer.default_local_dir={out}",
        "optim.lr=1e-3",
        *more,
    ]


def run(words: list[str]) -> subprocess.CompletedProcess[str]:
    return python.run(words, capture_output=True, text=True, timeout=200, check=False)


def stop_at(words: list[str], out: Path, step: int, number: signal.Signals) -> int:
    """Start the command and send a signal to its whole group once `step` steps are written down."""
    process = python.start(words, start_new_session=True, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    metrics = out / "metrics.jsonl"
    for _ in range(6000):
        if metrics.is_file() and len(metrics.read_text().splitlines()) >= step:
            break
        assert process.poll() is None, "the run ended before it could be stopped"
        time.sleep(0.01)
    if number == signal.SIGKILL:
        kill([process.pid, *descendants(process.pid)])
    else:
        os.kill(process.pid, number)
    return process.wait(timeout=120)


def assert_same_run(out: Path, reference: Path) -> None:
    assert (out / "model.safetensors").read_bytes() == (reference / "model.safetensors").read_bytes()
    steps = [record["step"] for record in read_metrics(out / "metrics.jsonl")]
    assert steps == list(range(1, STEPS + 1)), "each step stands in metrics.jsonl once"
    for mine, theirs in zip(
        read_metrics(out / "metrics.jsonl"), read_metrics(reference / "metrics.jsonl"), strict=True
    ):
        for name in ("train/loss", "train/grad_norm", "train/lr", "val/loss"):
            assert mine.get(name) == theirs.get(name), name


@pytest.fixture(scope="module")
def references(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """The run that was never stopped, on 1 and 2 processes."""
    found = {}
    for processes in (1, 2):
        found[processes] = tmp_path_factory.mktemp("reference") / "out"
        finished = run(command(inputs, found[processes], processes))
        assert finished.returncode == 0, finished.stderr[-3000:]
    return found


@pytest.mark.parametrize(("processes", "save_freq", "step"), [(1, 3, 8), (2, 2, 5)])
def test_killed_and_started_again(
    inputs: Path, references: dict[int, Path], tmp_path: Path, processes: int, save_freq: int, step: int
) -> None:
    out = tmp_path / "out"
    words = command(inputs, out, processes, f"trainer.save_freq={save_freq}")
    assert stop_at(words, out, step, signal.SIGKILL) != 0
    again = run(words)
    assert again.returncode == 0, again.stderr[-3000:]
    assert "resuming the run" in again.stderr
    assert_same_run(out, references[processes])


@pytest.mark.parametrize("processes", [1, 2])
def test_sigterm_saves_at_the_next_step_and_says_so(
    inputs: Path, references: dict[int, Path], tmp_path: Path, processes: int
) -> None:
    out = tmp_path / "out"
    words = command(inputs, out, processes, "trainer.save_freq=100")
    code = stop_at(words, out, 4, signal.SIGTERM)
    assert code == 75
    assert json.loads((out / "run.json").read_text())["status"] == "preempted"
    done = len(read_metrics(out / "metrics.jsonl"))
    assert done < STEPS
    assert (out / "checkpoints" / f"step_{done:06}").is_dir()
    again = run(words)
    assert again.returncode == 0, again.stderr[-3000:]
    assert_same_run(out, references[processes])


def test_another_number_of_processes_follows_the_same_samples(
    inputs: Path, references: dict[int, Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    words = command(inputs, out, 2, "trainer.save_freq=3", "model.fsdp_config.model_dtype=fp64")
    assert stop_at(words, out, 5, signal.SIGKILL) != 0
    again = run(command(inputs, out, 1, "trainer.save_freq=3", "model.fsdp_config.model_dtype=fp64"))
    assert again.returncode == 0, again.stderr[-3000:]
    found, expected = (read_metrics(f / "metrics.jsonl") for f in (out, references[1]))
    assert [r["train/targets"] for r in found] == [r["train/targets"] for r in expected]
    assert [r["step"] for r in found] == list(range(1, STEPS + 1))


def test_a_complete_run_says_so_and_another_configuration_is_refused(
    inputs: Path, references: dict[int, Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(references[1], out)
    complete = run(command(inputs, out, 1))
    assert (complete.returncode, "is complete" in complete.stderr) == (0, True)
    other = run(command(inputs, out, 1, "optim.lr=2e-3"))
    assert other.returncode == 2
    assert "optim.lr: 0.001 then, 0.002 now" in other.stderr
    aside = run(command(inputs, out, 1, "optim.lr=2e-3", "trainer.resume_mode=disable"))
    assert aside.returncode == 0, aside.stderr[-3000:]
    (previous,) = out.glob("previous-*")
    assert load_file(previous / "model.safetensors").keys() == load_file(out / "model.safetensors").keys()


def test_a_damaged_checkpoint_is_named_and_passed_over(
    inputs: Path, references: dict[int, Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    words = command(inputs, out, 1, "trainer.save_freq=3")
    assert stop_at(words, out, 8, signal.SIGKILL) != 0
    newest = max((out / "checkpoints").glob("step_*"))
    (file,) = newest.glob("*.safetensors")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    again = run(words)
    assert again.returncode == 0, again.stderr[-3000:]
    assert "skipped a damaged checkpoint" in again.stderr
    assert file.name in again.stderr
    assert_same_run(out, references[1])


def test_only_the_newest_are_kept(inputs: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    finished = run(command(inputs, out, 1, "trainer.save_freq=3", "trainer.max_ckpt_to_keep=1"))
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == ["latest", f"step_{STEPS:06}"]

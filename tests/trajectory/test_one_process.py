"""Whole runs in one process: golden losses, repetition, and where a run begins and ends."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from apollo_sft.errors import ConfigError
from apollo_sft.tools.verify.oracle import StaysDouble
from apollo_sft.train.optim.build import Schedule
from tests.support.data import write_parquet
from tests.support.runs import read_metrics, rows, series, status, train_here, without_clock, write_inputs

GOLDEN = Path(__file__).with_name("golden.json")
"""Written anew by `APOLLO_RECORD_GOLDEN=1 pytest tests/trajectory`. A change that records it says why."""
NAMES = ["train/loss", "train/grad_norm", "train/lr", "train/targets", "train/tokens", "val/loss"]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def twenty_steps(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return train_here(inputs, tmp_path_factory.mktemp("plain") / "out")


def test_golden_losses(inputs: Path, tmp_path: Path) -> None:
    """In float64 throughout, so that the figures do not depend on the order in which a machine sums."""
    with StaysDouble():
        metrics = train_here(inputs, tmp_path / "out", "model.fsdp_config.model_dtype=fp64")
    found = {name: series(metrics, name) for name in NAMES}
    if os.environ.get("APOLLO_RECORD_GOLDEN") == "1":
        GOLDEN.write_text(json.dumps(found, indent=1) + "\n")
    golden = json.loads(GOLDEN.read_text())
    assert golden.keys() == found.keys()
    assert len(golden["train/loss"]) == 20
    for name, values in golden.items():
        assert found[name] == pytest.approx(values, rel=1e-10, abs=0), name


def test_the_model_learns(twenty_steps: list[dict[str, Any]]) -> None:
    losses = series(twenty_steps, "train/loss")
    assert losses[-1] < 0.8 * losses[0]
    assert series(twenty_steps, "step") == list(range(1, 21))
    assert series(twenty_steps, "train/epoch") == pytest.approx([step / 5 for step in range(1, 21)])
    assert [record["step"] for record in twenty_steps if "val/loss" in record] == [5, 10, 15, 20]


def test_the_same_seed_gives_the_same_bits(inputs: Path, twenty_steps: list[dict[str, Any]], tmp_path: Path) -> None:
    again = train_here(inputs, tmp_path / "out")
    assert without_clock(again) == without_clock(twenty_steps)


def test_another_seed_gives_another_order(inputs: Path, twenty_steps: list[dict[str, Any]], tmp_path: Path) -> None:
    other = train_here(inputs, tmp_path / "out", "trainer.seed=2", "trainer.total_epochs=1")
    assert series(other, "train/loss") != series(twenty_steps[:5], "train/loss")
    assert sum(series(other, "train/targets")) == sum(series(twenty_steps[:5], "train/targets"))


TEN = "trainer.total_epochs=2"


@pytest.fixture(scope="module")
def ten_steps(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return train_here(inputs, tmp_path_factory.mktemp("ten") / "out", TEN)


@pytest.mark.parametrize("how", [{"data.micro_batch_size_per_gpu": 1}, {"model.enable_gradient_checkpointing": "true"}])
def test_how_a_step_is_computed_does_not_show(
    inputs: Path, ten_steps: list[dict[str, Any]], tmp_path: Path, how: dict[str, Any]
) -> None:
    metrics = train_here(inputs, tmp_path / "out", TEN, *(f"{key}={value}" for key, value in how.items()))
    for name in ("train/loss", "val/loss"):
        assert series(metrics, name) == pytest.approx(series(ten_steps, name), rel=1e-5, abs=0)


@pytest.mark.parametrize("total", [1, 3, 12])
def test_total_training_steps_overrides_epochs(inputs: Path, tmp_path: Path, total: int) -> None:
    """Below and above an epoch of five steps; the schedule and the last validation follow."""
    more = [f"trainer.total_training_steps={total}", "trainer.total_epochs=2", "optim.lr_warmup_steps=2"]
    metrics = train_here(inputs, tmp_path / "out", *more)
    schedule = Schedule("cosine", 1e-2, total, min(2, total), 0.0, 0.9)
    assert series(metrics, "train/lr") == [schedule.rate(step) for step in range(total)]
    assert metrics[0]["train/lr"] > 0
    validated = [record["step"] for record in metrics if "val/loss" in record]
    assert validated == [step for step in range(1, total + 1) if step % 5 == 0 or step == total]


def test_the_tail_of_an_epoch_is_trained_or_dropped(inputs: Path, tmp_path: Path) -> None:
    """40 rows in steps of 12: three whole ones and one of four rows."""
    more = ["data.train_batch_size=12", "trainer.total_epochs=2", "data.val_files=null"]
    whole = train_here(inputs, tmp_path / "whole", *more)
    dropped = train_here(inputs, tmp_path / "dropped", *more, "data.drop_last=true")
    assert (len(whole), len(dropped)) == (8, 6)
    assert series(whole, "train/epoch") == pytest.approx([step / 4 for step in range(1, 9)])
    assert series(dropped, "train/targets")[:3] == series(whole, "train/targets")[:3]
    tokens = series(whole, "train/tokens")
    assert sum(tokens[:4]) == sum(tokens[4:])
    assert not any("val/loss" in record for record in whole)


def test_dropping_the_only_batch_is_refused(inputs: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no step to train"):
        train_here(inputs, tmp_path / "out", "data.train_batch_size=64", "data.drop_last=true")
    assert status(tmp_path / "out") == "refused"


def test_one_row(inputs: Path, tmp_path: Path) -> None:
    file = write_parquet(tmp_path / "one.parquet", rows(1))
    metrics = train_here(inputs, tmp_path / "out", f"data.train_files={file}", f"data.val_files={file}")
    assert len(metrics) == 4, "one step an epoch"
    assert series(metrics, "train/targets") == [series(metrics, "val/targets")[0]] * 4
    assert series(metrics, "train/loss")[1:] == pytest.approx(series(metrics, "val/loss")[:-1], rel=1e-5)


def test_validation_before_training_is_of_the_base(inputs: Path, tmp_path: Path) -> None:
    more = ["trainer.val_before_train=true", "trainer.total_training_steps=3", "trainer.test_freq=1"]
    metrics = train_here(inputs, tmp_path / "out", *more)
    assert [record["step"] for record in metrics if "val/loss" in record] == [0, 1, 2, 3]
    assert "train/loss" not in metrics[0]


def test_a_run_leaves_the_trained_model(inputs: Path, tmp_path: Path) -> None:
    train_here(inputs, tmp_path / "out", "trainer.total_training_steps=2")
    before, after = (load_file(folder / "model.safetensors") for folder in (inputs / "model", tmp_path / "out"))
    assert before.keys() == after.keys()
    assert all((before[name] != after[name]).any() for name in before)
    assert status(tmp_path / "out") == "finished"
    assert len(read_metrics(tmp_path / "out")) == 2

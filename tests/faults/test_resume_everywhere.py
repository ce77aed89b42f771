"""A checkpoint after every step of three epochs, each gone on with; and layouts other than the one that saved it."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import pytest

from tests.support.data import write_parquet
from tests.support.forked import train_on_ranks
from tests.support.interrupted import (
    KINDS,
    differences,
    go_on,
    train_into,
    unfinished,
    whole_steps,
    write_dropout_inputs,
)
from tests.support.reliability import record
from tests.support.runs import read_metrics, rows, series, write_inputs

EPOCHS = 3
STEPS_PER_EPOCH = 3
STEPS = STEPS_PER_EPOCH * EPOCHS
KEYS = (f"trainer.total_epochs={EPOCHS}", "trainer.save_freq=1", "trainer.max_ckpt_to_keep=100", "trainer.test_freq=4")
LOSS_BOUND = 2e-5
"""Largest relative difference of a step's loss in float32 between two layouts of a training."""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_fewer_rows(write_dropout_inputs(tmp_path_factory.mktemp("inputs")))


def with_fewer_rows(inputs: Path) -> Path:
    """As many as `STEPS_PER_EPOCH` batches of eight."""
    write_parquet(inputs / "train.parquet", rows(8 * STEPS_PER_EPOCH))
    return inputs


def run(inputs: Path, out: Path, ranks: int, *keys: str) -> None:
    if ranks == 1:
        go_on(inputs, out, *keys)
        return
    codes = train_on_ranks(inputs, out, ranks, *keys)
    assert codes == [0] * ranks, (out.parent / "ranks.log").read_text()[-3000:]


def resume_from_each(inputs: Path, tmp_path: Path, ranks: int, keys: tuple[str, ...]) -> None:
    """An epoch ends at every third step."""
    reference = tmp_path / "reference"
    run(inputs, reference, ranks, *keys)
    assert whole_steps(reference) == list(range(1, STEPS + 1))
    wrong, worst = [], 0.0
    starts = range(1, STEPS + 1)
    for step in starts:
        out = unfinished(reference, tmp_path / "out", step)
        began = time.perf_counter()
        run(inputs, out, ranks, *keys)
        worst = max(worst, time.perf_counter() - began)
        wrong += [f"from step {step}: {problem}" for problem in differences(out, reference)]
        shutil.rmtree(out)
    kind = "LoRA" if len(keys) > len(KEYS) else "all weights"
    where = "1 rank" if ranks == 1 else f"{ranks} ranks"
    name = f"a resume from the checkpoint after each step of {EPOCHS} epochs, {where}, {kind}, dropout"
    record(name, trials=len(starts), failures=len(wrong), worst_seconds=worst)
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("kind", ["plain", pytest.param("LoRA", marks=pytest.mark.long)])
def test_one_rank(inputs: Path, tmp_path: Path, kind: str) -> None:
    resume_from_each(inputs, tmp_path, 1, KEYS + KINDS[kind])


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks(inputs: Path, tmp_path: Path, kind: str) -> None:
    resume_from_each(inputs, tmp_path, 2, KEYS + KINDS[kind])


RESHAPED = {
    "2 ranks to 1": ((2, ()), (1, ())),
    "2 ranks to 4": ((2, ()), (4, ("data.micro_batch_size_per_gpu=2",))),
    "1 rank to 2": ((1, ()), (2, ())),
    "sp 2 to sp 1": ((2, ("ulysses_sequence_parallel_size=2",)), (2, ())),
    "sp 1 to sp 2": ((2, ()), (2, ("ulysses_sequence_parallel_size=2",))),
    "fsdp2 to fsdp": ((2, ()), (2, ("model.strategy=fsdp",))),
    "fsdp to fsdp2": ((2, ("model.strategy=fsdp",)), (2, ())),
    "4 ranks of sp 2 to 1": ((4, ("ulysses_sequence_parallel_size=2", "data.micro_batch_size_per_gpu=2")), (1, ())),
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name == "2 ranks to 1" else pytest.mark.long) for name in RESHAPED]
)
def test_another_layout_goes_on(tmp_path: Path, name: str) -> None:
    """Without dropout, whose masks belong to ranks. The reference is one rank that was never stopped."""
    inputs = with_fewer_rows(write_inputs(tmp_path / "inputs"))
    (ranks, keys), (later_ranks, later_keys) = RESHAPED[name]
    reference = tmp_path / "reference"
    train_into(inputs, reference, *KEYS)
    first = tmp_path / "first"
    run(inputs, first, ranks, *KEYS, *keys)
    out = unfinished(first, tmp_path / "out", 5)
    began = time.perf_counter()
    run(inputs, out, later_ranks, *KEYS, *later_keys)
    seconds = time.perf_counter() - began
    found, expected = read_metrics(out), read_metrics(reference)
    samples = [series(metrics, "train/targets") + series(metrics, "train/tokens") for metrics in (found, expected)]
    off = [
        abs(mine - theirs) / theirs
        for mine, theirs in zip(series(found, "train/loss"), series(expected, "train/loss"), strict=True)
    ]
    print(f"{name}: largest relative difference of a step's loss {max(off):.1e}, bound {LOSS_BOUND:.0e}")
    failures = int(max(off) > LOSS_BOUND or samples[0] != samples[1])
    record(f"a resume on another layout: {name}", trials=1, failures=failures, worst_seconds=seconds)
    assert [line["step"] for line in found] == list(range(1, STEPS + 1))
    assert samples[0] == samples[1]
    assert max(off) <= LOSS_BOUND

"""What a step is said to have taken: its wait for data, and the model's operations over the peak."""

import gzip
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from apollo_sft.config.compose import compose
from apollo_sft.data.batch.loader import Loader, StepBatch
from apollo_sft.data.batch.plan import PlanSpec
from apollo_sft.data.store.open import SampleStore
from apollo_sft.errors import ConfigError
from apollo_sft.model.flops import cost_of
from apollo_sft.model.load import build_on_meta, read_config
from apollo_sft.train.gpu_peaks import known_peak
from apollo_sft.train.meter import Meter
from apollo_sft.train.precision import DTYPES
from apollo_sft.train.step import StepResult, Vote
from apollo_sft.train.step_profile import Profile
from tests.support.runs import arguments, train_here, without_clock, write_inputs
from tests.support.samples import random_samples, write_store

WAIT, WORK, VALIDATION = 2**-4, 2**-6, 2**-1
"""Seconds of a clock that goes only while somebody sleeps. Powers of two add up exactly."""


class Clock:
    """In the place of `time.perf_counter` and `time.sleep`: no busy machine can make it late."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(time, "sleep", self.sleep)

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A100 80GB PCIe", 312e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA A10", 125e12),
        ("NVIDIA A10G", None),
        ("NVIDIA L40", None),
        ("NVIDIA GeForce RTX 4090", None),
    ],
)
def test_only_a_known_gpu_has_a_peak(name: str, peak: float | None) -> None:
    assert known_peak(name) == peak


def test_the_wait_is_what_the_loader_took_and_belongs_to_the_step(clock: Clock, tmp_path: Path) -> None:
    loader = Loader(write_store(tmp_path, random_samples(8)), PlanSpec(4, 1, 1, seed=1), 0)

    def slow() -> Iterator[StepBatch]:
        for step in range(2):
            time.sleep(WAIT)
            yield loader.batch(step)

    meter = Meter(steps_per_epoch=2)
    records = []
    for batch in meter.batches(slow()):
        time.sleep(WORK)
        records.append(meter.record(batch, StepResult(1.0, 1.0, 2**20, Vote.NOTHING), 1e-3))
        time.sleep(VALIDATION)
    assert [record["train/epoch"] for record in records] == [0.5, 1.0]
    for record in records:
        assert record["perf/data_wait_seconds"] >= WAIT
        took = record["train/step_seconds"]
        assert WORK <= took - record["perf/data_wait_seconds"] < VALIDATION
        assert took < WAIT + WORK + VALIDATION
        assert record["train/tokens_per_second"] == record["train/tokens"] / took
        assert "perf/mfu" not in record


def test_a_run_with_a_stated_peak_gives_the_share_of_it(tmp_path: Path) -> None:
    inputs, out = write_inputs(tmp_path / "inputs"), tmp_path / "out"
    more = ("trainer.peak_tflops=0.5", "trainer.total_training_steps=3", "data.val_files=null")
    metrics = train_here(inputs, out, *more)
    config = compose(arguments(inputs, out, *more)).config
    [folder] = [path for path in (inputs / "store").iterdir() if path.is_dir()]
    loader = Loader(SampleStore(folder), PlanSpec(8, 4, 1, seed=config.trainer.seed), 0)
    cost = cost_of(build_on_meta(read_config(inputs / "model", False), DTYPES["fp32"], False))
    assert [record["step"] for record in metrics] == [1, 2, 3]
    for record in metrics:
        batch = loader.batch(int(record["step"]) - 1)
        assert int(np.sum(batch.lengths)) == record["train/tokens"]
        operations = cost.of(batch.lengths, batch.num_targets)
        assert record["perf/mfu"] == pytest.approx(operations / (record["train/step_seconds"] * 0.5e12), rel=1e-9)


def traced(path: Path) -> list[str]:
    """Names of the steps in a trace."""
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    assert any(event["name"] == "aten::mm" for event in events)
    return sorted({event["name"] for event in events if event["name"].startswith("step ")})


def test_the_wanted_steps_are_recorded_and_nothing_of_the_training_changes(tmp_path: Path) -> None:
    inputs = write_inputs(tmp_path / "inputs")
    more = ("trainer.total_training_steps=4", "data.val_files=null")
    plain = train_here(inputs, tmp_path / "plain", *more)
    try:
        recorded = train_here(
            inputs, tmp_path / "out", *more, "trainer.profile_steps=[2,3]", "trainer.deterministic=true"
        )
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
    assert without_clock(recorded) == without_clock(plain)
    [trace] = (tmp_path / "out" / "profile").iterdir()
    assert trace.name == "steps_2-3.json.gz"
    assert traced(trace) == ["step 2", "step 3"]
    train_here(inputs, tmp_path / "short", *more, "trainer.profile_steps=[4,9]")
    [trace] = (tmp_path / "short" / "profile").iterdir()
    assert trace.name == "steps_4-4.json.gz"
    assert traced(trace) == ["step 4"]
    assert not (tmp_path / "plain" / "profile").exists()


@pytest.mark.parametrize("value", ["[3]", "[5,4]", "[0,2]", "[1,2,3]"])
def test_profiled_steps_are_a_first_and_a_last(value: str) -> None:
    with pytest.raises(ConfigError, match=r"trainer\.profile_steps"):
        compose(["data.val_files=null", f"trainer.profile_steps={value}"])


def test_writing_the_trace_is_no_wait_for_data(clock: Clock, tmp_path: Path) -> None:
    loader = Loader(write_store(tmp_path / "store", random_samples(8)), PlanSpec(4, 1, 1, seed=1), 0)

    class Slow(Profile):
        def _write(self, profiler: Any, done: int) -> None:
            profiler.stop()
            time.sleep(VALIDATION * done)

    meter = Meter(steps_per_epoch=2, profile=Slow(1, 1, tmp_path))
    result = StepResult(1.0, 1.0, 2**20, Vote.NOTHING)
    waits = []
    for batch in meter.batches(loader.batch(n) for n in range(2)):
        clock.sleep(WORK)
        waits.append(meter.record(batch, result, 1e-3))
    assert all(record["perf/data_wait_seconds"] < VALIDATION / 2 for record in waits)

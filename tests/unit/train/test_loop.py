"""When the loop validates."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from apollo_sft.config.compose import compose
from apollo_sft.data.batch.loader import Loader
from apollo_sft.data.batch.plan import PlanSpec
from apollo_sft.train.optim.build import Schedule
from apollo_sft.train.run_state import Run
from tests.support.samples import random_samples, write_store


def run_of(folder: Path, total_steps: int, *overrides: str, with_val: bool = True) -> Run:
    """10 rows in steps of 4: three an epoch."""
    loader = Loader(write_store(folder, random_samples(10)), PlanSpec(4, 1, 1, seed=1), 0)
    values: dict[str, Any] = dict.fromkeys(field.name for field in dataclasses.fields(Run))
    values |= {"schedule": Schedule("cosine", 1.0, total_steps, 0, 0.0, 0.9), "train": loader}
    values["val"] = loader if with_val else None
    values["config"] = compose(["data.train_files=x", "data.val_files=null", *overrides]).config
    return Run(**values)


@pytest.mark.parametrize(
    ("total_steps", "overrides", "expected"),
    [
        (9, [], [3, 6, 9]),
        (7, [], [3, 6, 7]),
        (2, [], [2]),
        (7, ["trainer.test_freq=2"], [2, 4, 6, 7]),
        (4, ["trainer.test_freq=100"], [4]),
    ],
)
def test_validation_at_the_ends_of_epochs_or_every_so_often_and_at_the_end(
    tmp_path: Path, total_steps: int, overrides: list[str], expected: list[int]
) -> None:
    run = run_of(tmp_path, total_steps, *overrides)
    assert run.train.steps_per_epoch == 3
    assert [step + 1 for step in range(total_steps) if run.validates_after(step)] == expected


def test_no_validation_without_a_store(tmp_path: Path) -> None:
    run = run_of(tmp_path, 6, with_val=False)
    assert not any(run.validates_after(step) for step in range(6))

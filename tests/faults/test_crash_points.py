"""The world ends at every file operation of a run: of its checkpoints, their pruning, the pointers and the export.

What is then on disk is looked at as it is, and after what a power loss may take (`Moment.lose`). The same command again
must go on from the newest checkpoint that was whole, and finish bit-equal to the run that was never stopped.
"""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.support.file_operations import LOSSES, FileOperations, Moment
from tests.support.interrupted import (
    KINDS,
    bury_owner,
    differences,
    fingerprint,
    go_on,
    train_into,
    write_dropout_inputs,
)
from tests.support.reliability import record

KEYS = (
    "trainer.total_training_steps=2",
    "trainer.save_freq=1",
    "trainer.test_freq=1",
    "trainer.max_ckpt_to_keep=1",
    "trainer.save_best_on=val/loss",
)
CASES = {
    "asynchronous": (),
    "synchronous": ("trainer.checkpoint.async_save=false",),
    "LoRA": KINDS["LoRA"],
    "hf/ for the last only": ("trainer.checkpoint.hf_model_at=best_and_last", "trainer.save_best_on=null"),
}
COVERING = 7
"""`make test` takes every so many-th crash point, as it is and after one of the losses in turn."""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dropout_inputs(tmp_path_factory.mktemp("inputs"))


@dataclass
class Report:
    """`points`: prefixes of the run. `states`: what each may leave on disk; `tried`: those that differ."""

    points: int = 0
    states: int = 0
    tried: int = 0
    worst_seconds: float = 0.0
    bad: list[str] = field(default_factory=list)


def moments_of_a_run(inputs: Path, folder: Path, keys: Sequence[str]) -> list[Moment]:
    out = folder / "out"
    operations = FileOperations(None, out, copies=folder / "copies")
    with pytest.MonkeyPatch.context() as patch, operations.active(patch):
        train_into(inputs, out, *keys)
    return operations.moments


def durable_step(moment: Moment) -> int:
    """The newest checkpoint whose folder had its name, when that name was synced; 0 without one."""
    newest, named = 0, 0
    for line in moment.log:
        if found := re.fullmatch(r"rename checkpoints/step_(\d+)", line):
            named = int(found[1])
        elif line == "fsync checkpoints":
            newest = named
    return newest


def try_state(inputs: Path, state: Path, reference: Path, keys: Sequence[str], at_least: int) -> list[str]:
    """Give the same command again in the folder `state`. What is wrong then."""
    notes: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("apollo_sft.train.claim.say", notes.append)
        try:
            go_on(inputs, state, *keys)
        except Exception as error:  # whatever it is, the run did not go on
            return [f"{type(error).__name__}: {error}"]
    wrong = differences(state, reference)
    begun = re.search(r"resuming the run .* from (?:step_(\d+))?", "\n".join(notes))
    if begun is not None and int(begun[1] or 0) < at_least:
        wrong.append(f"went on from {begun[1]}, though step {at_least} was durable")
    if begun is None and at_least and notes:
        wrong.append(f"began anew, though step {at_least} was durable")
    return wrong + [note for note in notes if "damaged" in note and "skipped" in note and f"{at_least:06}" in note]


def enumerate_crashes(inputs: Path, tmp_path: Path, keys: Sequence[str], every: int) -> Report:
    report, seen = Report(), set()
    out = tmp_path / "out"
    moments = moments_of_a_run(inputs, tmp_path, keys)
    reference = shutil.copytree(out, tmp_path / "reference", symlinks=True)
    for number in range(0, len(moments), every):
        moment = moments[number]
        report.points += 1
        losses = LOSSES if every == 1 else LOSSES[report.points % len(LOSSES) :][:1]
        for loss in (None, *losses):
            shutil.rmtree(out, ignore_errors=True)
            assert moment.copy is not None
            shutil.copytree(moment.copy, out, symlinks=True)
            if loss:
                moment.lose(loss)
            out.mkdir(exist_ok=True)
            bury_owner(out)
            report.states += 1
            found = fingerprint(out)
            if found in seen:
                continue
            seen.add(found)
            began = time.perf_counter()
            wrong = try_state(inputs, out, reference, keys, durable_step(moment))
            report.worst_seconds = max(report.worst_seconds, time.perf_counter() - began)
            report.bad += [f"{number}, after {moment.log[-1:]}, loss: {loss}: {problem}" for problem in wrong]
    report.tried = len(seen)
    return report


def check(name: str, inputs: Path, tmp_path: Path, keys: Sequence[str], every: int) -> None:
    report = enumerate_crashes(inputs, tmp_path, (*KEYS, *keys), every)
    record(name, trials=report.states, failures=len(report.bad), worst_seconds=report.worst_seconds)
    print(f"{name}: {report.points} crash points, {report.states} states, {report.tried} of them distinct")
    assert not report.bad, "\n".join(report.bad[:20])
    assert report.points > 100 // every


def test_a_covering_set_of_crash_points(inputs: Path, tmp_path: Path) -> None:
    check("crash points of a run, as is and after a power loss (a covering set)", inputs, tmp_path, (), COVERING)


@pytest.mark.long
@pytest.mark.parametrize("case", CASES)
@pytest.mark.timeout(3600)
def test_all_crash_points(inputs: Path, tmp_path: Path, case: str) -> None:
    check(f"all crash points of a run, as is and after a power loss ({case})", inputs, tmp_path, CASES[case], 1)

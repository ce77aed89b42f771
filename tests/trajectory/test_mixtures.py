"""Whole runs on several sources: names alone change nothing, weights are kept to, and a stop does not show."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from apollo_sft.cli.main import main
from apollo_sft.errors import ConfigError, DataError
from apollo_sft.report.run_document import document
from apollo_sft.report.run_files import read_runs
from tests.support.data import write_parquet
from tests.support.interrupted import differences, unfinished, write_dropout_inputs
from tests.support.runs import arguments, finish, read_metrics, rows, series, start, status, train_here, without_clock

WEIGHTS = "[{{path:{0}/train.parquet,weight:1,name:easy}},{{path:{0}/hard.parquet,weight:3}}]"
SETS = "[{{path:{0}/val.parquet,name:first}},{{path:{0}/other.parquet}}]"
"""An epoch of the mixture: 53 samples, 13 of the 40 easy ones and 40 of the 13 hard ones."""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_dropout_inputs(tmp_path_factory.mktemp("inputs"))
    write_parquet(folder / "hard.parquet", rows(13, seed=3))
    write_parquet(folder / "other.parquet", rows(5, seed=4))
    return folder


def files(inputs: Path, train: str = WEIGHTS) -> list[str]:
    return [f"data.train_files={train.format(inputs)}", f"data.val_files={SETS.format(inputs)}"]


@pytest.fixture(scope="module")
def mixed(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("mixed") / "out"
    train_here(inputs, out, *files(inputs), *KEYS)
    return out


KEYS = ("trainer.total_epochs=2", "trainer.save_freq=4", "trainer.max_ckpt_to_keep=9")


def test_names_alone_change_nothing_that_is_trained(inputs: Path, tmp_path: Path) -> None:
    one_epoch = "trainer.total_epochs=1"
    plain = f"[{inputs}/train.parquet,{inputs}/hard.parquet]"
    validation = f"data.val_files=[{inputs}/val.parquet,{inputs}/other.parquet]"
    without = train_here(inputs, tmp_path / "plain", f"data.train_files={plain}", validation, one_epoch)
    names = "[{{path:{0}/train.parquet}},{{path:{0}/hard.parquet}}]"
    named = train_here(inputs, tmp_path / "named", *files(inputs, names), one_epoch)
    kept = [{key: record[key] for key in before} for record, before in zip(named, without, strict=True)]
    assert without_clock(kept) == without_clock(without)
    assert not [key for record in without for key in record if key.count("/") > 1]
    stores = [json.loads((tmp_path / run / "data_audit.json").read_text())["train"] for run in ("plain", "named")]
    assert stores[0]["store"] == stores[1]["store"]


def test_the_metrics_of_the_sources_make_up_those_of_the_step(mixed: Path) -> None:
    metrics = read_metrics(mixed)
    assert [record["step"] for record in metrics] == list(range(1, 15))
    for record in metrics:
        parts = [(record.get(f"train/{n}/loss", 0.0), record[f"train/{n}/targets"]) for n in ("easy", "hard")]
        assert sum(targets for _, targets in parts) == record["train/targets"]
        mean = sum(loss * targets for loss, targets in parts) / record["train/targets"]
        assert mean == pytest.approx(record["train/loss"], rel=1e-6)
    for record in (metrics[6], metrics[13]):
        sets = [(record[f"val/{name}/loss"], record[f"val/{name}/targets"]) for name in ("first", "other")]
        assert sum(targets for _, targets in sets) == record["val/targets"]
        mean = sum(loss * targets for loss, targets in sets) / record["val/targets"]
        assert mean == pytest.approx(record["val/loss"], rel=1e-12)
        assert sets[0][0] != sets[1][0]
    assert len(series(metrics, "val/first/loss")) == 2


def test_the_audit_says_what_an_epoch_takes(mixed: Path) -> None:
    audit = json.loads((mixed / "data_audit.json").read_text())
    easy, hard = audit["train"]["sources"].values()
    assert list(audit["train"]["sources"]) == ["easy", "hard"]
    assert (easy["num_samples"], easy["samples_per_epoch"]) == (40, 13)
    assert (hard["num_samples"], hard["samples_per_epoch"]) == (13, 40)
    assert hard["times_per_epoch"] == pytest.approx(40 / 13)
    assert easy["num_targets"] + hard["num_targets"] == audit["train"]["num_targets"]
    assert easy["targets_ratio"] + hard["targets_ratio"] == pytest.approx(1)
    trained = sum(series(read_metrics(mixed), "train/hard/targets")) / 2
    assert trained == pytest.approx(hard["targets_per_epoch"], rel=0.05)
    sets = audit["validation"]["sources"]
    assert {name: of["num_samples"] for name, of in sets.items()} == {"first": 7, "other": 5}


@pytest.mark.parametrize("steps", [4, 8])
def test_a_run_that_stopped_in_an_epoch_goes_on_bit_for_bit(
    inputs: Path, mixed: Path, tmp_path: Path, steps: int
) -> None:
    out = unfinished(mixed, tmp_path / "out", steps)
    train_here(inputs, out, *files(inputs), *KEYS)
    assert differences(out, mixed) == []


def test_a_run_does_not_go_on_with_other_weights(inputs: Path, mixed: Path, tmp_path: Path) -> None:
    out = unfinished(mixed, tmp_path / "out", 4)
    with pytest.raises(ConfigError) as refused:
        train_here(inputs, out, *files(inputs, WEIGHTS.replace("weight:3", "weight:2")), *KEYS)
    assert "taking (13, 40) of (40, 13) samples" in str(refused.value)
    assert "taking (18, 35) of (40, 13) samples" in str(refused.value)


@pytest.mark.long
def test_another_number_of_ranks_goes_on_with_the_same_samples(inputs: Path, mixed: Path, tmp_path: Path) -> None:
    out = unfinished(mixed, tmp_path / "out", 4)
    said = finish(start(inputs, out, *files(inputs), *KEYS, processes=2))
    assert status(out) == "finished", said
    for name in ("train/easy/targets", "train/hard/targets", "train/targets", "val/other/targets"):
        assert series(read_metrics(out), name) == series(read_metrics(mixed), name)


def test_the_report_draws_each_source(mixed: Path) -> None:
    blocks = {block.title: block for block in document(read_runs([mixed])).blocks if hasattr(block, "title")}
    plots: dict[str, Any] = {plot.title: plot for plot in blocks["Curves"].plots}  # type: ignore[union-attr]
    assert [curve.name for curve in plots["Loss of each source"].curves] == ["easy", "hard"]
    assert len(plots["Loss of each source"].curves[1].points) == 14
    assert [curve.name for curve in plots["Validation loss of each set"].curves] == ["first", "other"]
    table = blocks["Sources"].rows  # type: ignore[union-attr]
    assert [row[0] for row in table] == ["train: easy", "train: hard", "validation: first", "validation: other"]
    assert table[1][4:6] == ["40", "3.077"]


def test_inspect_shows_what_an_epoch_takes(inputs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", *arguments(inputs, inputs / "none", *files(inputs)), "--count", "1"]) == 0
    said = capsys.readouterr().out
    rows_shown = [line.split() for line in said.splitlines() if re.match(r"\W*(train|validation): \w+ +\d", line)]
    assert [row[:2] for row in rows_shown] == [
        ["train:", "easy"],
        ["train:", "hard"],
        ["validation:", "first"],
        ["validation:", "other"],
    ]
    assert [row[5:7] for row in rows_shown[:2]] == [["13", "0.325"], ["40", "3.077"]]
    assert re.search(r"steps per epoch +7\b", said)


@pytest.mark.parametrize(
    ("train", "words"),
    [
        ("[{{path:{0}/hard.parquet,max_samples:14}}]", ["source hard has fewer samples", "13 samples, max_samples 14"]),
        (
            "[{{path:{0}/hard.parquet}},{{path:'{0}/*hard.parquet',name:b}}]",
            ["hard and b", "same file", "hard.parquet"],
        ),
        ("[{{path:{0}/none.parquet}},{{path:{0}/hard.parquet}}]", ["data.train_files", "none.parquet"]),
        ("[{{path:{0}/nothing.parquet}},{{path:{0}/hard.parquet}}]", ["source nothing has no sample"]),
    ],
)
def test_sources_that_cannot_give_what_they_should_are_refused(
    inputs: Path, tmp_path: Path, train: str, words: list[str]
) -> None:
    write_parquet(inputs / "nothing.parquet", [{"question": "one", "answer": "two", "train": False}])
    with pytest.raises(DataError) as refused:
        train_here(inputs, tmp_path / "out", *files(inputs, train))
    assert all(word in str(refused.value) for word in words), refused.value

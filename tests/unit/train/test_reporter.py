import json
import re
from pathlib import Path

import pytest

from apollo_sft.config.compose import compose
from apollo_sft.config.schema import TrainerConfig
from apollo_sft.report import sinks
from apollo_sft.report.log import setup_logging
from apollo_sft.report.metrics import Record, StepFacts, read_metrics, train_record, val_record
from apollo_sft.report.sinks import RunInfo
from apollo_sft.train.reporter import Reporter

LAST_STEP = 11


def trainer_config(*arguments: str) -> TrainerConfig:
    return compose(["model.partial_pretrain=base", "trainer.log_freq=4", *arguments]).config.trainer


def run_info(folder: Path) -> RunInfo:
    return RunInfo(folder, "project", "experiment", {"optim": {"lr": 1e-5}})


def records() -> list[Record]:
    """Eleven steps, a validation before the first and after the 6th and the last."""
    made: list[Record] = [{"step": 0} | val_record(3.0, 40)]
    for step in range(1, LAST_STEP + 1):
        record = train_record(StepFacts(step, 2.0 / step, 1.0, 1e-5, 60, 100, 0.5, step / 11, 2**20))
        made.append(record | (val_record(2.5 / step, 40) if step in (6, LAST_STEP) else {}))
    return made


def run_all(trainer: TrainerConfig, info: RunInfo | None) -> Reporter:
    setup_logging(is_main=info is not None)
    reporter = Reporter(trainer, info, LAST_STEP)
    for record in records():
        reporter.record(record)
    reporter.close()
    return reporter


def tensorboard_steps(folder: Path, name: str) -> dict[int, float]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return {event.step: event.value for event in EventAccumulator(str(folder / "tensorboard")).Reload().Scalars(name)}


def test_metrics_jsonl_gets_every_record_whatever_the_loggers_are(tmp_path: Path) -> None:
    run_all(trainer_config("trainer.logger=[]"), run_info(tmp_path))
    assert read_metrics(tmp_path / "metrics.jsonl") == records()
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_line_is_in_the_file_before_the_next_step(tmp_path: Path) -> None:
    reporter = Reporter(trainer_config("trainer.logger=[file]"), run_info(tmp_path), LAST_STEP)
    for number, record in enumerate(records(), start=1):
        reporter.record(record)
        assert len(read_metrics(tmp_path / "metrics.jsonl")) == number
    reporter.close()


def test_loggers_get_every_log_freq_th_step_both_ends_and_validations(tmp_path: Path) -> None:
    run_all(trainer_config("trainer.logger=[tensorboard]"), run_info(tmp_path))
    expected = {int(record["step"]): record for record in records() if record["step"] in (1, 4, 6, 8, 11)}
    for name in ("train/loss", "train/lr", "memory/peak_bytes"):
        found = tensorboard_steps(tmp_path, name)
        assert found == {step: pytest.approx(record[name]) for step, record in expected.items()}
    assert list(tensorboard_steps(tmp_path, "val/loss")) == [0, 6, 11]


def test_the_console_shows_the_same_steps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_all(trainer_config("trainer.logger=[console]"), run_info(tmp_path))
    lines = capsys.readouterr().err.splitlines()
    assert [re.split(r"[ /]+", line)[1] for line in lines if "validation" not in line] == ["1", "4", "8", "11"]
    assert [line for line in lines if "validation" in line] == [
        "step  0/11  validation loss 3.0000 (40 targets)",
        "step  6/11  validation loss 0.4167 (40 targets)",
        "step 11/11  validation loss 0.2273 (40 targets)",
    ]


def test_a_console_that_was_not_asked_for_is_silent(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_all(trainer_config("trainer.logger=[file]"), run_info(tmp_path))
    assert capsys.readouterr() == ("", "")


def test_off_rank_0_nothing_is_written_or_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    run_all(trainer_config("trainer.logger=[console,tensorboard]"), None)
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr() == ("", "")


def test_it_remembers_what_the_summary_says(tmp_path: Path) -> None:
    reporter = run_all(trainer_config("trainer.logger=[]"), run_info(tmp_path))
    assert (reporter.steps, reporter.tokens, reporter.seconds) == (11, 1100, 5.5)
    assert [record["step"] for record in reporter.validations] == [0, 6, 11]


class FailsAtStep8:
    """A logger as other people write them: it takes what it gets and breaks in the middle of a run."""

    def __init__(self, info: RunInfo) -> None:
        self._path = info.folder / "other.txt"

    def log(self, record: Record) -> None:
        if record["step"] == 8:
            raise ValueError("the service is away")
        with self._path.open("a") as file:
            file.write(f"{record['step']}\n")

    def close(self) -> None:
        raise AssertionError("was left out before")


def test_a_logger_that_fails_is_said_once_and_the_rest_stays_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sinks.BACKENDS, "wandb", sinks.Backend("json", __name__, "FailsAtStep8"))
    run_all(trainer_config("trainer.logger=[wandb,tensorboard]"), run_info(tmp_path))
    warnings = [line for line in capsys.readouterr().err.splitlines() if "logger" in line]
    assert warnings == [
        "warning: the logger wandb failed and is left out from here on: ValueError: the service is away"
    ]
    assert (tmp_path / "other.txt").read_text() == "0\n1\n4\n6\n"
    assert [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == records()
    assert list(tensorboard_steps(tmp_path, "train/loss")) == [1, 4, 6, 8, 11]

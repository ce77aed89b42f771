import importlib.util
import json
import resource
import struct
import sys
import time
import tomllib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from apollo_sft.errors import ConfigError, Preempted
from apollo_sft.report import sinks
from apollo_sft.report.log import setup_logging
from apollo_sft.report.metrics import Record, StepFacts, train_record, val_record
from apollo_sft.report.sinks import RunInfo, Sinks, check_backends

RECORDS: list[Record] = [
    {"step": 0} | val_record(2.5, 40),
    train_record(StepFacts(10, 1.5, 2.0, 1e-5, 60, 100, 0.5, 0.5, 2**20)),
    train_record(StepFacts(20, 1.25, 1.0, 5e-6, 61, 101, 0.5, 1.0, 2**20)) | val_record(1.75, 40),
]
BLOCK = 32768
"""Bytes of a block in wandb's offline file, which has the layout of a LevelDB log."""


@pytest.fixture
def info(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunInfo:
    monkeypatch.setenv("WANDB_MODE", "offline")
    for name in ("CONFIG", "CACHE", "DATA"):
        monkeypatch.setenv(f"WANDB_{name}_DIR", str(tmp_path / "wandb-home" / name))
    folder = tmp_path / "run"
    folder.mkdir()
    setup_logging(is_main=True)
    return RunInfo(folder, "my-project", "my-experiment", {"optim": {"lr": 1e-5}, "data": {"prompt_key": "question"}})


def run_all(names: list[str], info: RunInfo) -> None:
    opened = Sinks(names, info)
    for record in RECORDS:
        opened.log(record)
    opened.close()


def test_tensorboard_holds_every_metric_at_its_step(info: RunInfo) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run_all(["tensorboard"], info)
    events = EventAccumulator(str(info.folder / "tensorboard")).Reload()
    names = {name for record in RECORDS for name in record} - {"step"}
    assert set(events.Tags()["scalars"]) == names
    for name in names:
        found = {event.step: event.value for event in events.Scalars(name)}
        # tensorboard stores 32 bits
        assert found == {record["step"]: pytest.approx(record[name], rel=1e-6) for record in RECORDS if name in record}


def test_tensorboard_shows_a_step_that_was_done_again_once(info: RunInfo) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    killed = Sinks(["tensorboard"], info)
    for step in (0, 1, 2, 3, 4):
        killed.log({"step": step, "val/loss": 10.0 + step})
    killed.close()
    again = Sinks(["tensorboard"], replace(info, first_step=2))
    for step in (3, 4, 5):
        again.log({"step": step, "val/loss": 20.0 + step})
    again.close()
    events = EventAccumulator(str(info.folder / "tensorboard")).Reload().Scalars("val/loss")
    assert [(event.step, event.value) for event in events] == [(0, 10), (1, 11), (2, 12), (3, 23), (4, 24), (5, 25)]


def test_tensorboard_forgets_what_a_start_from_the_first_step_does_again(info: RunInfo) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for value in (1.0, 2.0):
        opened = Sinks(["tensorboard"], info)
        for step in (0, 1):
            opened.log({"step": step, "val/loss": value})
        opened.close()
    events = EventAccumulator(str(info.folder / "tensorboard")).Reload().Scalars("val/loss")
    assert [(event.step, event.value) for event in events] == [(0, 2), (1, 2)]


def offline_records(folder: Path) -> Iterator[Any]:
    """The records of the one offline run under `folder`, in order."""
    [path] = folder.glob("wandb/offline-run-*/run-*.wandb")
    yield from records_of(path)


def records_of(path: Path) -> Iterator[Any]:
    from wandb.proto.wandb_internal_pb2 import Record as WandbRecord

    content, position, pending = path.read_bytes(), 7, b""
    while position < len(content):
        room = BLOCK - position % BLOCK
        if room < 7:
            position += room
            continue
        _, length, kind = struct.unpack_from("<IHB", content, position)
        pending += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            yield WandbRecord.FromString(pending)
            pending = b""
    assert not pending


def values(items: Any) -> dict[str, Any]:
    return {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items}


def test_wandb_offline_holds_every_metric_the_names_and_the_config(info: RunInfo) -> None:
    run_all(["wandb"], info)
    records = list(offline_records(info.folder))
    [run] = [record.run for record in records if record.WhichOneof("record_type") == "run"]
    assert (run.project, run.display_name) == ("my-project", "my-experiment")
    assert values(run.config.update).items() >= info.config.items()
    history = [record.history for record in records if record.WhichOneof("record_type") == "history"]
    assert [line.step.num for line in history] == [0, 10, 20]
    for line, record in zip(history, RECORDS, strict=True):
        found = {name: value for name, value in values(line.item).items() if not name.startswith("_")}
        assert found == {name: value for name, value in record.items() if name != "step"}
    [end] = [record.exit for record in records if record.WhichOneof("record_type") == "exit"]
    assert end.exit_code == 0


def test_wandb_is_told_that_a_run_failed(info: RunInfo) -> None:
    def failing_run() -> None:
        opened = Sinks(["wandb"], info)
        try:
            opened.log(RECORDS[0])
            raise RuntimeError("out of memory")
        finally:
            opened.close()

    with pytest.raises(RuntimeError, match="out of memory"):
        failing_run()
    [end] = [record.exit for record in offline_records(info.folder) if record.WhichOneof("record_type") == "exit"]
    assert end.exit_code == 1


def starts(folder: Path) -> list[tuple[str, list[int]]]:
    """(id of the run, its steps) of every start that left a file, in order."""
    found = []
    for path in sorted(folder.glob("wandb/offline-run-*/run-*.wandb"), key=lambda path: path.stat().st_mtime_ns):
        records = list(records_of(path))
        [run_id] = {record.run.run_id for record in records if record.WhichOneof("record_type") == "run"}
        steps = [record.history.step.num for record in records if record.WhichOneof("record_type") == "history"]
        found.append((run_id, steps))
    return found


def test_wandb_goes_on_with_the_same_run(info: RunInfo, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    asked = []
    init = wandb.init
    monkeypatch.setattr(wandb, "init", lambda **settings: (asked.append(settings["resume"]), init(**settings))[1])
    for first_step in (0, 2, 3):
        if first_step:
            time.sleep(1.1)  # an offline folder is named by the second
        opened = Sinks(["wandb"], replace(info, first_step=first_step))
        for step in (first_step + 1, first_step + 2):
            opened.log({"step": step, "train/loss": 1.0})
        opened.close()
    (first_id, _), *later = found = starts(info.folder)
    assert [steps for _, steps in found] == [[1, 2], [3, 4], [4, 5]]
    assert {run_id for run_id, _ in later} == {first_id}
    assert asked == ["allow"] * 3


def test_wandb_takes_the_id_of_the_environment_and_another_folder_another_id(
    info: RunInfo, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = replace(info, folder=info.folder.with_name("other"))
    other.folder.mkdir()
    for each in (info, other):
        run_all(["wandb"], each)
    time.sleep(1.1)
    [(mine, _)], [(others, _)] = starts(info.folder), starts(other.folder)
    assert mine != others
    monkeypatch.setenv("WANDB_RUN_ID", "chosen-by-the-user")
    run_all(["wandb"], info)
    assert [run_id for run_id, _ in starts(info.folder)] == [mine, "chosen-by-the-user"]


def test_wandb_is_told_that_a_run_was_preempted(info: RunInfo) -> None:
    def stopped_run() -> None:
        opened = Sinks(["wandb"], info)
        try:
            raise Preempted("stopped by SIGTERM")
        finally:
            opened.close()

    with pytest.raises(Preempted):
        stopped_run()
    assert "preempting" in {record.WhichOneof("record_type") for record in offline_records(info.folder)}


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_backend_that_is_not_installed_names_key_and_extra(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda package, *rest: None if package == name else find_spec(package, *rest)
    )
    check_backends(["console", "file"])
    with pytest.raises(ConfigError) as caught:
        check_backends(["console", "tensorboard", "wandb"])
    assert f"trainer.logger: {name} needs the package {name}" in str(caught.value)
    assert f"pip install 'apollo-sft[{name}]'" in str(caught.value)
    assert caught.value.exit_code == 2


def test_the_extras_that_are_named_exist() -> None:
    extras = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    for name, backend in sinks.BACKENDS.items():
        assert any(requirement.startswith(backend.package) for requirement in extras[name])


def test_a_folder_of_that_name_is_not_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An earlier run may have left a folder `wandb` where the program starts."""
    (tmp_path / "left_by_a_logger").mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.setattr(sinks, "BACKENDS", sinks.BACKENDS | {"wandb": sinks.Backend("left_by_a_logger", "", "")})
    assert importlib.util.find_spec("left_by_a_logger") is not None
    with pytest.raises(ConfigError, match=r"apollo-sft\[wandb\]"):
        check_backends(["wandb"])


def test_a_sink_that_fails_is_reported_once_and_the_others_go_on(
    info: RunInfo, capsys: pytest.CaptureFixture[str]
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    opened = Sinks(["wandb", "tensorboard"], info)
    opened.log({"step": 0, "val/loss": 2.0})
    import wandb

    assert wandb.run is not None
    wandb.run.finish()  # what wandb refuses from here on is a real failure of the backend
    for step in (1, 2, 3):
        opened.log({"step": step, "val/loss": 2.0})
    opened.close()
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: the logger")]
    assert len(warnings) == 1
    assert "wandb" in warnings[0]
    events = EventAccumulator(str(info.folder / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("val/loss")] == [0, 1, 2, 3]


def test_a_sink_that_cannot_start_is_left_out(info: RunInfo, capsys: pytest.CaptureFixture[str]) -> None:
    (info.folder / "tensorboard").write_text("a file where the folder should be")
    run_all(["tensorboard", "console", "file"], info)
    assert capsys.readouterr().err.count("the logger tensorboard failed") == 1


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_disk_that_fills_up_costs_tensorboard_and_not_the_run(
    info: RunInfo, capsys: pytest.CaptureFixture[str]
) -> None:
    opened = Sinks(["tensorboard"], info)
    opened.log({"step": 0, "val/loss": 2.0})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))
    try:
        for step in range(1, 200):
            opened.log({"step": step, "val/loss": 2.0})
        opened.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert capsys.readouterr().err.count("the logger tensorboard failed") == 1


def test_replies_are_a_table_in_wandb_and_texts_in_tensorboard(info: RunInfo) -> None:
    from tensorboard.backend.event_processing.event_accumulator import TENSORS, EventAccumulator

    reply = {"row": "a.parquet row 0", "prompt": "one\n", "expected": "two", "text": "<b>three", "stopped": True}
    opened = Sinks(["wandb", "tensorboard"], info)
    opened.replies(10, [reply, reply | {"text": "four"}])
    opened.log({"step": 10, "val/loss": 1.0})
    opened.close()
    [table] = info.folder.glob("wandb/offline-run-*/files/media/table/val/replies_*.table.json")
    shown = json.loads(table.read_text())
    assert shown["columns"] == ["row", "prompt", "expected", "text"]
    assert [row[3] for row in shown["data"]] == ["<b>three", "four"]
    events = EventAccumulator(str(info.folder / "tensorboard"), size_guidance={TENSORS: 0}).Reload()
    [text] = [event.tensor_proto.string_val[0].decode() for event in events.Tensors("val/reply_0/text_summary")]
    assert "    <b>three" in text and "    one" in text

"""The stages of a run: what they record, what an error and a signal in one of them say."""

import errno
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from apollo_sft.checkpoint.run_folder.folder import RunFolder
from apollo_sft.errors import CheckpointError, ConfigError, Preempted, Stopped, message_of
from apollo_sft.train.signals import StopFlag
from apollo_sft.train.stages import Stages


@pytest.fixture
def stages(tmp_path: Path) -> Iterator[Stages]:
    with StopFlag() as stop:
        stages = Stages(stop, str(tmp_path / "run"))
        with stages.process_group("cpu", False, 60):
            yield stages


def claim(folder: Path) -> RunFolder:
    claimed = RunFolder.claim(folder, "auto", {})
    claimed.write_run("running")
    return claimed


def facts(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "run.json").read_text())
    return found


def fail(error: BaseException) -> None:
    raise error


def test_run_json_names_the_present_stage_and_the_seconds_of_all(stages: Stages, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    seen = []

    def work() -> str:
        seen.append(facts(folder))
        return "result"

    with stages.run_folder(lambda: claim(folder)):
        stages.record({"base": {"untied": True}})
        assert stages.once_per_host("preparing the data", work) == "result"
        assert stages.on_main("checking the model", work) == "result"
        with stages.between_steps("training"):
            work()
        assert [run["stage"] for run in seen] == ["preparing the data", "checking the model", "training"]
        assert [run["status"] for run in seen] == ["running"] * 3

    ended = facts(folder)
    names = ["joining the other processes", "claiming the run folder"]
    assert list(ended["stages"]) == [*names, "preparing the data", "checking the model", "training"]
    assert (ended["status"], ended["stage"], ended["base"]) == ("finished", None, {"untied": True})


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (ConfigError("bad", fix="mend it"), "refused", "bad\n  to do:    mend it\n  while:    preparing the data"),
        (ValueError("boom"), "failed", "boom\n  while:    preparing the data"),
        (Preempted("stopped after step 3"), "preempted", "stopped after step 3"),
    ],
)
def test_an_error_names_its_stage(stages: Stages, tmp_path: Path, error: Exception, status: str, message: str) -> None:
    with pytest.raises(type(error)) as caught, stages.run_folder(lambda: claim(tmp_path / "run")):
        stages.on_all("preparing the data", fail, error)
    assert message_of(caught.value) == message
    ended = facts(tmp_path / "run")
    assert (ended["status"], ended["stage"]) == (status, "preparing the data")


def test_a_full_disk_is_said_in_words_with_the_stage(stages: Stages, tmp_path: Path) -> None:
    full = OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "run"))
    with pytest.raises(CheckpointError, match="the disk has no room for this run") as caught:
        stages.on_all("writing the model", fail, full)
    assert message_of(caught.value).endswith("\n  while:    writing the model")


def test_what_follows_the_model_does_not_undo_that_the_run_is_finished(stages: Stages, tmp_path: Path) -> None:
    def upload() -> None:
        with stages.run_folder(lambda: claim(tmp_path / "run")):
            stages.model_is_written()
            stages.record({"uploaded": False})
            stages.on_main("uploading the model", fail, ValueError("no network"))

    with pytest.raises(ValueError, match="no network"):
        upload()
    ended = facts(tmp_path / "run")
    assert (ended["status"], ended["uploaded"], ended["stage"]) == ("finished", False, "uploading the model")


def test_a_signal_names_the_stage_and_what_is_kept(stages: Stages, tmp_path: Path) -> None:
    def work() -> None:
        os.kill(os.getpid(), signal.SIGUSR1)

    with pytest.raises(Stopped) as caught, stages.run_folder(lambda: claim(tmp_path / "run")):
        stages.on_all("writing the model", work, kept="its last checkpoint holds all steps")
    assert message_of(caught.value) == (
        "stopped by SIGUSR1 while writing the model: its last checkpoint holds all steps"
    )
    assert facts(tmp_path / "run")["status"] == "preempted"


def test_between_steps_a_signal_waits_for_the_next_stage(stages: Stages) -> None:
    with stages.between_steps("training"):
        os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(Stopped, match="stopped by SIGTERM while writing the model: no step was trained"):
        stages.on_all("writing the model", fail, AssertionError("is not reached"))

"""Who may use a run folder, and what becomes of an earlier run in it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from apollo_sft.checkpoint import publish
from apollo_sft.checkpoint.run_folder.folder import RunFolder, read_run, redact
from apollo_sft.errors import AlreadyDone, ConfigError

CONFIG = {"name": "first"}


def a_run(root: Path, name: str = "first", model: bool = True, mode: str = "auto") -> None:
    """What a finished run leaves, recognisable by `name`."""
    folder = RunFolder.claim(root, mode, CONFIG)
    folder.write_run("running")
    folder.write_config(f"name: {name}\n")
    folder.metrics.write_text(f'{{"step": 1, "name": "{name}"}}\n')
    folder.audit.write_text(name)
    (folder.checkpoints / "step-1").mkdir(parents=True)
    if model:
        staging = publish.staging_folder(root, "model")
        for file in ("config.json", "model.safetensors"):
            (staging / file).write_text(name)
        publish.publish_model(staging, root, lambda _: None)
    folder.write_run("finished")
    folder.release()


def visible(root: Path) -> set[str]:
    return {path.name for path in root.iterdir() if not path.name.startswith(".")}


def contents(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def previous(root: Path) -> list[Path]:
    return sorted(root.glob("previous-*"))


RUN = {"run.json", "config.yaml", "metrics.jsonl", "data_audit.json", "checkpoints", "config.json", "model.safetensors"}


@pytest.mark.parametrize("mode", ["auto", "disable"])
def test_a_new_or_empty_folder_is_claimed(tmp_path: Path, mode: str) -> None:
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "a" / "b", tmp_path / "empty"):
        folder = RunFolder.claim(path, mode, CONFIG)
        assert folder.notes == []
        folder.write_run("running", layout={"ranks": 2})
        assert (read_run(path) or {})["layout"] == {"ranks": 2}


def test_the_home_folder_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert RunFolder.claim("~/out", "auto", CONFIG).root == tmp_path / "out"


@pytest.mark.parametrize("mode", ["auto", "disable"])
@pytest.mark.parametrize("name", ["config.json", "metrics.jsonl", "checkpoints", "previous-20240101-000000", "notes"])
def test_files_that_are_not_ours_are_named_and_untouched(tmp_path: Path, mode: str, name: str) -> None:
    if name.startswith(("checkpoints", "previous")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "step-1").write_text("mine")
    else:
        (tmp_path / name).write_text("mine")
    before = contents(tmp_path)
    with pytest.raises(ConfigError, match=name) as refusal:
        RunFolder.claim(tmp_path, mode, CONFIG)
    assert refusal.value.exit_code == 2
    assert "trainer.default_local_dir" in str(refusal.value)
    assert contents(tmp_path) == before


def test_up_to_five_files_are_named(tmp_path: Path) -> None:
    for number in range(8):
        (tmp_path / f"file-{number}").write_text("mine")
    with pytest.raises(ConfigError, match="file-0, file-1, file-2, file-3, file-4 and 3 more"):
        RunFolder.claim(tmp_path, "auto", CONFIG)


def test_a_run_json_of_somebody_else_is_not_ours(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text('{"kind": "other", "status": "finished"}')
    with pytest.raises(ConfigError, match=r"run\.json"):
        RunFolder.claim(tmp_path, "disable", CONFIG)


def test_a_file_beside_a_run_of_ours_is_still_not_ours(tmp_path: Path) -> None:
    a_run(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    before = contents(tmp_path)
    with pytest.raises(ConfigError, match=r"notes\.txt"):
        RunFolder.claim(tmp_path, "disable", CONFIG)
    assert contents(tmp_path) == before


def test_a_run_of_another_configuration_is_refused(tmp_path: Path) -> None:
    a_run(tmp_path)
    before = contents(tmp_path)
    with pytest.raises(ConfigError, match="name: first then, second now") as refusal:
        RunFolder.claim(tmp_path, "auto", {"name": "second"})
    assert "trainer.resume_mode=disable" in str(refusal.value)
    assert "another trainer.default_local_dir" in str(refusal.value)
    assert contents(tmp_path) == before
    a_run(tmp_path, "second", mode="disable")  # the refusal holds no lock


def test_a_complete_run_of_the_same_configuration_is_done(tmp_path: Path) -> None:
    a_run(tmp_path)
    before = contents(tmp_path)
    with pytest.raises(AlreadyDone, match="complete") as done:
        RunFolder.claim(tmp_path, "auto", CONFIG | {"trainer": {"log_freq": 7}})
    assert done.value.exit_code == 0
    assert contents(tmp_path) == before


def test_an_unfinished_run_goes_on_from_its_newest_whole_checkpoint(tmp_path: Path) -> None:
    a_run(tmp_path, model=False)
    for step in (3, 6, 9):
        staging = publish.staging_folder(tmp_path / "checkpoints", f"step_{step:06}")
        facts = {"step": step, "contents": ["model", "optimizer", "extra"], "config": CONFIG, "data": "x"}
        (staging / "state.json").write_text(json.dumps(facts))
        publish.publish_directory(staging, tmp_path / "checkpoints" / f"step_{step:06}")
    (tmp_path / "checkpoints" / "step_000009" / "state.json").write_text("other")
    (tmp_path / "checkpoints" / "step_000012").mkdir()
    folder = RunFolder.claim(tmp_path, "auto", CONFIG)
    assert folder.resume_from == tmp_path / "checkpoints" / "step_000006"
    assert any("step_000009" in note and "state.json" in note for note in folder.notes)


def test_disable_moves_the_earlier_run_aside_whole(tmp_path: Path) -> None:
    a_run(tmp_path, "first")
    before = {name: content for name, content in contents(tmp_path).items() if name != ".apollo-lock"}
    folder = RunFolder.claim(tmp_path, "disable", CONFIG)
    assert visible(tmp_path) == {path.name for path in previous(tmp_path)}
    assert contents(previous(tmp_path)[0]) == before
    assert previous(tmp_path)[0].name in folder.notes[0]
    folder.release()
    for name in ("second", "third"):
        a_run(tmp_path, name, mode="disable")
    names = {(path / "data_audit.json").read_text() for path in previous(tmp_path)}
    assert names == {"first", "second"}
    assert visible(tmp_path) == RUN | {path.name for path in previous(tmp_path)}


def test_a_run_that_trained_nothing_is_written_over(tmp_path: Path) -> None:
    """For example one that was refused: the next try must not be told that its folder is taken."""
    folder = RunFolder.claim(tmp_path, "auto", CONFIG)
    folder.write_run("refused")
    folder.write_config("a: 1\n")
    folder.metrics.touch()
    folder.release()
    again = RunFolder.claim(tmp_path, "auto", CONFIG)
    again.write_run("running")
    assert previous(tmp_path) == []


def test_one_live_run_for_each_folder(tmp_path: Path) -> None:
    folder = RunFolder.claim(tmp_path, "auto", CONFIG)
    folder.write_run("running")
    staging = publish.staging_folder(tmp_path, "model")
    for mode in ("auto", "disable"):
        with pytest.raises(ConfigError, match=f"process {os.getpid()}"):
            RunFolder.claim(tmp_path, mode, CONFIG)
    assert staging.is_dir(), "the other claim must not undo the save of the live run"
    folder.release()
    RunFolder.claim(tmp_path, "auto", CONFIG).release()


def test_the_claim_ends_with_the_process(tmp_path: Path) -> None:
    code = "import os, sys; from apollo_sft.checkpoint.run_folder.folder import RunFolder; "
    code += "folder = RunFolder.claim(sys.argv[1], 'auto', {}); os._exit(9)"
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False).returncode == 9
    RunFolder.claim(tmp_path, "auto", CONFIG)


def test_an_interrupted_save_is_undone_before_anything_else(tmp_path: Path) -> None:
    a_run(tmp_path, model=False)
    (publish.staging_folder(tmp_path, "model") / "model.safetensors").write_text("half")
    folder = RunFolder.claim(tmp_path, "disable", CONFIG)
    assert any("interrupted" in note for note in folder.notes)
    assert not list(tmp_path.glob(f"{publish.STAGING_PREFIX}*"))


def unwritable(tmp_path: Path) -> Iterator[Path]:
    (tmp_path / "file").write_text("")
    yield tmp_path / "file"
    yield tmp_path / "file" / "below"
    yield Path("/proc/nothing")


@pytest.mark.parametrize("case", [0, 1, 2])
def test_a_folder_that_cannot_be_written_is_told_at_the_start(tmp_path: Path, case: int) -> None:
    path = list(unwritable(tmp_path))[case]
    with pytest.raises(ConfigError, match=r"trainer\.default_local_dir"):
        RunFolder.claim(path, "auto", CONFIG)


def test_run_json_says_what_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = ["python", "-m", "apollo_sft", "a=https://user:secret@host/x", "b=hf_abcdefghijklmnopqrstuv", "c=1"]
    monkeypatch.setattr(sys, "orig_argv", command)
    folder = RunFolder.claim(tmp_path, "auto", CONFIG)
    folder.write_run("running", layout={"ranks": 2, "dp": 2, "sp": 1})
    running = json.loads(folder.run_json.read_text())
    assert running["command"] == ["python", "-m", "apollo_sft", "a=https://***@host/x", "b=***", "c=1"]
    assert set(running["versions"]) == {"python", "torch", "transformers", "apollo-sft"}
    assert all(running["versions"].values())
    assert running["finished"] is None
    folder.write_run("failed", error="out of memory")
    failed = json.loads(folder.run_json.read_text())
    assert (failed["status"], failed["error"], failed["layout"]) == ("failed", "out of memory", running["layout"])
    assert failed["started"] == running["started"]
    assert failed["finished"]


@pytest.mark.parametrize(
    "text", ["trainer.total_epochs=4", "data.train_files=https://host/x@y.parquet", "num_memory_tokens=3"]
)
def test_what_is_no_secret_stays(text: str) -> None:
    assert redact(text) == text

"""A kill or a power loss at every file operation of a save, and of the recovery after it."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from apollo_sft.checkpoint import publish
from apollo_sft.errors import CheckpointError
from tests.support.file_operations import Crash, FileOperations

OLD = {
    "config.json": "old config",
    "model-00001-of-00002.safetensors": "old 1",
    "model-00002-of-00002.safetensors": "old 2",
    "model.safetensors.index.json": "old index",
    "tokenizer.json": "old tokenizer",
}
NEW = {"config.json": "new config", "model.safetensors": "new weights", "tokenizer.json": "new tokenizer"}
FOREIGN = {"metrics.jsonl": "{}", "notes.txt": "mine"}


def accept(_folder: Path) -> None:
    """The content check has tests of its own."""


def save(folder: Path, files: dict[str, str]) -> None:
    staging = publish.staging_folder(folder, "model")
    for name, text in files.items():
        with (staging / name).open("w") as file:
            file.write(text)
    publish.publish_model(staging, folder, accept)


def visible(folder: Path) -> dict[str, str]:
    return {
        path.name: path.read_text()
        for path in folder.iterdir()
        if path.is_file() and not path.name.startswith(".") and path.name not in FOREIGN
    }


def is_whole(folder: Path) -> str:
    """`old` or `new`; fails on a mixture."""
    found = visible(folder)
    assert found in (OLD, NEW), f"a mixture: {found}"
    return "old" if found == OLD else "new"


def check_foreign_and_clean(folder: Path) -> None:
    for name, text in FOREIGN.items():
        assert (folder / name).read_text() == text
    hidden = {path.name for path in folder.iterdir() if path.name.startswith(".")}
    assert hidden == {publish.MANIFEST}, f"left over: {hidden}"
    assert sorted(publish.model_files(folder)) == sorted([*visible(folder), publish.MANIFEST])


@pytest.fixture
def prepared(tmp_path: Path) -> Path:
    folder = tmp_path / "prepared"
    folder.mkdir()
    for name, text in FOREIGN.items():
        (folder / name).write_text(text)
    save(folder, OLD)
    return folder


def crashes(operations: FileOperations, monkeypatch: pytest.MonkeyPatch, action: Callable[[], object]) -> bool:
    """Run `action`; True when it was stopped, False when it ended before that."""
    with operations.active(monkeypatch):
        try:
            action()
        except Crash:
            return True
    return False


def crash_save(folder: Path, crash_at: int, monkeypatch: pytest.MonkeyPatch, lose: str | None) -> bool:
    """Save NEW over OLD and stop at operation `crash_at`. False when the save ended before."""
    operations = FileOperations(crash_at)
    crashed = crashes(operations, monkeypatch, lambda: save(folder, NEW))
    if crashed and lose:
        operations.lose(lose)
    return crashed


@pytest.mark.parametrize("lose", [None, "all", "oldest"])
def test_a_crash_at_every_operation_leaves_the_old_or_the_new_model(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lose: str | None
) -> None:
    outcomes = []
    for crash_at in range(1000):
        folder = shutil.copytree(prepared, tmp_path / f"at-{crash_at}")
        if not crash_save(folder, crash_at, monkeypatch, lose):
            break
        if "config.json" in visible(folder):
            is_whole_without_recovery(folder)
        publish.recover(folder)
        outcomes.append(is_whole(folder))
        check_foreign_and_clean(folder)
    assert is_whole(folder) == "new"
    assert len(outcomes) > 20
    assert outcomes == sorted(outcomes, key=["old", "new"].index), "old up to the decision, new from then on"
    assert set(outcomes) == {"old", "new"}


def is_whole_without_recovery(folder: Path) -> None:
    """Somebody may open the folder before our next start: while it has a config.json it is one of the two models."""
    found = visible(folder)
    model = NEW if found["config.json"] == NEW["config.json"] else OLD
    assert {name: found.get(name) for name in model} == model


@pytest.mark.parametrize("lose", [None, "all", "oldest"])
def test_a_crash_inside_the_recovery_is_recovered(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lose: str | None
) -> None:
    crash_points = 0
    for crash_at in range(0, 1000):
        broken = shutil.copytree(prepared, tmp_path / f"broken-{crash_at}")
        if not crash_save(broken, crash_at, monkeypatch, None):
            break
        for again_at in range(1000):
            folder = shutil.copytree(broken, tmp_path / f"again-{crash_at}-{again_at}")
            operations = FileOperations(again_at)
            if not crashes(operations, monkeypatch, partial(publish.recover, folder)):
                break
            crash_points += 1
            if lose:
                operations.lose(lose)
            publish.recover(folder)
            is_whole(folder)
            check_foreign_and_clean(folder)
            shutil.rmtree(folder)
    assert crash_points > 50


def test_a_real_kill_in_the_middle_of_the_move(prepared: Path) -> None:
    script = textwrap.dedent("""
        import pathlib, sys, time
        sys.path[:0] = sys.argv[2:]
        from apollo_sft.checkpoint import publish
        import test_publish
        replace = pathlib.Path.replace
        def slowly(self, target):
            done = replace(self, target)
            if pathlib.Path(target).name == "model.safetensors":
                print("moving", flush=True)
                time.sleep(60)
            return done
        pathlib.Path.replace = slowly
        test_publish.save(pathlib.Path(sys.argv[1]), test_publish.NEW)
    """)
    here = Path(__file__).resolve().parent
    command = [sys.executable, "-c", script, str(prepared), str(here), str(here.parents[1])]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    with process.stdout as output:
        assert output.readline() == "moving\n"
        process.send_signal(signal.SIGKILL)
        assert process.wait(timeout=30) == -signal.SIGKILL
    assert "config.json" not in visible(prepared), "half moved: nothing that loads"
    publish.recover(prepared)
    assert is_whole(prepared) == "new"
    check_foreign_and_clean(prepared)


def test_a_check_that_fails_leaves_the_old_model(prepared: Path) -> None:
    staging = publish.staging_folder(prepared, "model")
    (staging / "config.json").write_text("new")

    def refuse(_folder: Path) -> None:
        raise CheckpointError("not what was written")

    with pytest.raises(CheckpointError, match="not what was written"):
        publish.publish_model(staging, prepared, refuse)
    publish.recover(prepared)
    assert is_whole(prepared) == "old"


def test_a_file_of_somebody_else_is_not_overwritten_and_the_model_is_not_lost(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("mine")
    with pytest.raises(CheckpointError, match=r"config\.json") as refusal:
        save(tmp_path, NEW)
    assert (tmp_path / "config.json").read_text() == "mine"
    (aside,) = tmp_path.glob("model-*")
    assert str(aside) in str(refusal.value)
    assert visible(aside) == NEW


def test_a_damaged_file_of_a_decided_move_is_named(prepared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for crash_at in range(1000):
        crash_save(prepared, crash_at, monkeypatch, None)
        if (prepared / publish.JOURNAL).exists():
            break
    (staging,) = prepared.glob(f"{publish.STAGING_PREFIX}*")
    (staging / "model.safetensors").write_text("new wEights")
    with pytest.raises(CheckpointError, match=r"model\.safetensors is missing or damaged"):
        publish.recover(prepared)
    assert (staging / "config.json").exists(), "nothing was moved"


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "a/../../outside", "link/outside", ".."])
def test_a_journal_that_points_outside_is_refused(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (tmp_path / "outside").write_text("mine")
    (folder / "link").symlink_to(tmp_path)
    journal = {"staging": f"{publish.STAGING_PREFIX}model", "files": {}, "stale": [name]}
    (folder / publish.JOURNAL).write_text(json.dumps(journal))
    with pytest.raises(CheckpointError, match="not a journal of ours"):
        publish.recover(folder)
    assert (tmp_path / "outside").read_text() == "mine"


def test_recovery_leaves_a_link_alone(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "file").write_text("mine")
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / f"{publish.STAGING_PREFIX}model").symlink_to(elsewhere)
    publish.recover(folder)
    assert (elsewhere / "file").read_text() == "mine"


def save_directory(parent: Path) -> None:
    staging = publish.staging_folder(parent, "step-5")
    (staging / "sub").mkdir()
    for name in ("weights", "sub/state"):
        with (staging / name).open("w") as file:
            file.write(name)
    publish.publish_directory(staging, parent / "step-5")


def test_a_whole_folder_appears_at_once_or_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for crash_at in range(1000):
        parent = tmp_path / f"at-{crash_at}"
        parent.mkdir()
        operations = FileOperations(crash_at)
        if not crashes(operations, monkeypatch, partial(save_directory, parent)):
            break
        operations.lose("all")
        publish.recover(parent)
        assert list(parent.iterdir()) in ([], [parent / "step-5"])
        if (parent / "step-5").exists():
            check_described(parent / "step-5")
    check_described(parent / "step-5")
    assert crash_at > 10
    with pytest.raises(CheckpointError, match="exists already"):
        save_directory(parent)


def check_described(folder: Path) -> None:
    manifest = json.loads((folder / publish.DIRECTORY_MANIFEST).read_text())["files"]
    assert set(manifest) == {"weights", "sub/state"}
    for name, facts in manifest.items():
        assert publish.describe_file(folder / name) == facts
        assert (folder / name).read_text() == name


def test_what_has_returned_is_durable(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    operations = FileOperations(None)
    assert not crashes(operations, monkeypatch, lambda: (save(prepared, NEW), save_directory(tmp_path)))
    operations.lose("all")
    assert is_whole(prepared) == "new"
    publish.recover(prepared)  # the emptied staging folder may have come back
    check_foreign_and_clean(prepared)
    check_described(tmp_path / "step-5")


def test_a_file_is_replaced_in_one_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "run.json"
    for crash_at in range(10):
        publish.write_durably(path, "old")
        operations = FileOperations(crash_at)
        if not crashes(operations, monkeypatch, lambda: publish.write_durably(path, "a longer new text")):
            break
        operations.lose("all")
        assert path.read_text() in ("old", "a longer new text")
    assert crash_at >= 3
    assert path.read_text() == "a longer new text"


def test_recovery_of_a_clean_folder_does_nothing(prepared: Path) -> None:
    before = {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in prepared.iterdir()}
    time.sleep(0.01)
    assert publish.recover(prepared) == []
    assert {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in prepared.iterdir()} == before


def test_a_stale_file_behind_a_link_is_left_alone(tmp_path: Path) -> None:
    """The user moved a sub-folder of an earlier model elsewhere, and left a link."""
    folder = tmp_path / "model"
    for files in (("config.json", "sub/x.txt"), ("config.json",)):
        staging = publish.staging_folder(folder, "model")
        for name in files:
            (staging / name).parent.mkdir(exist_ok=True)
            (staging / name).write_text("{}")
        publish.publish_model(staging, folder, lambda _: None)
        if len(files) > 1:
            assert (folder / "sub" / "x.txt").is_file()
            (folder / "sub").rename(tmp_path / "elsewhere")
            (folder / "sub").symlink_to(tmp_path / "elsewhere")
    assert (tmp_path / "elsewhere" / "x.txt").is_file()
    assert (folder / "config.json").is_file()
    assert publish.recover(folder) == []


def test_sub_folders_are_moved_and_empty_ones_go(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    for files in (("config.json", "code/deep/a.py"), ("config.json", "code/b.py"), ("config.json",)):
        staging = publish.staging_folder(folder, "model")
        for name in files:
            (staging / name).parent.mkdir(parents=True, exist_ok=True)
            (staging / name).write_text(str(files))
        publish.publish_model(staging, folder, lambda _: None)
        there = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
        assert there - {publish.MANIFEST} == set(files)
    assert not (folder / "code").exists()

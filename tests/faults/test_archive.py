"""A kill at every file operation while an earlier run moves to `previous-<time>/`."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from apollo_sft.checkpoint import publish
from apollo_sft.checkpoint.run_folder.folder import RunFolder, read_run
from tests.support.file_operations import LOSSES, FileOperations
from tests.support.interrupted import bury_owner


@pytest.fixture
def prepared(tmp_path: Path) -> Path:
    root = tmp_path / "prepared"
    folder = RunFolder.claim(root, "auto", {})
    folder.write_run("running")
    folder.metrics.write_text('{"step": 1}\n')
    folder.checkpoints.mkdir()
    (folder.checkpoints / "state").write_text("state")
    staging = publish.staging_folder(root, "model")
    for name in ("config.json", "model.safetensors"):
        (staging / name).write_text(name)
    publish.publish_model(staging, root, lambda _: None)
    folder.write_run("finished")
    folder.release()
    return root


def run_files(root: Path) -> dict[str, bytes]:
    files = (path for path in root.rglob("*") if path.is_file())
    passing = (".apollo-lock", ".apollo-owner", ".apollo-probe")
    return {str(p.relative_to(root)): p.read_bytes() for p in files if not p.name.startswith(passing)}


@pytest.mark.parametrize("lose", [None, *LOSSES])
@pytest.mark.parametrize("next_mode", ["auto", "disable"])
def test_the_earlier_run_is_whole_in_one_place(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lose: str | None, next_mode: str
) -> None:
    expected = run_files(prepared)
    root = shutil.copytree(prepared, tmp_path / "run")
    operations = FileOperations(None, root, copies=tmp_path / "copies")
    with operations.active(monkeypatch):
        RunFolder.claim(root, "disable", {}).release()
    for moment in operations.moments:
        shutil.rmtree(root)
        assert moment.copy is not None
        shutil.copytree(moment.copy, root)
        if lose:
            moment.lose(lose)
        bury_owner(root)
        decided = bool(list(root.glob(".apollo-previous-*")) or list(root.glob("previous-*")))
        if not decided:
            assert run_files(root) == expected
            continue
        RunFolder.claim(root, next_mode, {}).release()
        (previous,) = root.glob("previous-*")
        assert run_files(previous) == expected
        assert read_run(root) is None
    assert len(operations.moments) > 12

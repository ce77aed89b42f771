"""What lies in a folder already, and what an interrupted move leaves."""

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from apollo_sft.checkpoint.publish import describe_file
from apollo_sft.cli.main import main
from apollo_sft.prepare import output as output_module
from apollo_sft.prepare.output import ROW_GROUP

ROWS = [{"question": f"{i} + 1?", "answer": f"#### {i + 1}"} for i in range(8)]


def write_source(folder: Path, rows: list[dict[str, Any]] = ROWS) -> Path:
    folder.mkdir(exist_ok=True)
    for split, part in (("train", rows[:-2]), ("test", rows[-2:])):
        (folder / f"{split}.jsonl").write_text("\n".join(json.dumps(row) for row in part), encoding="utf-8")
    return folder


def prepare(source: Path, out: Path, *options: str) -> int:
    return main(["prepare", "gsm8k", "--local_dataset_path", str(source), "--local_dir", str(out), *options])


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_manifest_describes_every_file_and_the_same_source_gives_the_same_bytes(tmp_path: Path) -> None:
    source = write_source(tmp_path / "source", [*ROWS[:3], {"question": "", "answer": "1"}, *ROWS[3:]])
    assert prepare(source, tmp_path / "out") == 0
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["splits"]["train"] == {"rows_in": 7, "rows_out": 6, "rejected": {"no question": 1}}
    assert set(manifest["files"]) == {"train.parquet", "test.parquet", "rejected.jsonl"}
    for name, facts in manifest["files"].items():
        assert describe_file(tmp_path / "out" / name) == facts
    assert manifest["source"]["files"][str(source / "train.jsonl")] == describe_file(source / "train.jsonl")
    (rejected,) = (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()
    assert json.loads(rejected) == {
        "split": "train",
        "file": str(source / "train.jsonl"),
        "row": 3,
        "reason": "no question",
    }
    first = contents(tmp_path / "out")
    assert prepare(source, tmp_path / "out") == 0
    assert contents(tmp_path / "out") == first


@pytest.mark.parametrize("name", ["train.parquet", "rejected.jsonl", "manifest.json"])
def test_files_of_others_are_not_replaced(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_source(tmp_path / "source")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text("mine")
    assert prepare(source, tmp_path / "out") == 2
    assert f"found:    {name}\n" in capsys.readouterr().err
    assert contents(tmp_path / "out") == {name: b"mine"}
    assert prepare(source, tmp_path / "out", "--overwrite") == 0
    assert (tmp_path / "out" / name).read_bytes() != b"mine"


def test_a_file_that_was_changed_since_is_not_replaced(tmp_path: Path) -> None:
    source = write_source(tmp_path / "source")
    assert prepare(source, tmp_path / "out") == 0
    with (tmp_path / "out" / "train.parquet").open("ab") as file:
        file.write(b"x")
    assert prepare(source, tmp_path / "out") == 2


def test_after_an_error_nothing_has_changed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_source(tmp_path / "source")
    with (source / "test.jsonl").open("a") as file:
        file.write("\n{broken")
    assert prepare(source, tmp_path / "out") == 2
    assert f"{source}/test.jsonl line 3: not valid JSON" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_move_that_was_interrupted_is_no_obstacle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process dies between two files, so nothing is cleaned up."""
    source = write_source(tmp_path / "source")
    assert prepare(source, tmp_path / "out") == 0
    old = contents(tmp_path / "out")
    replace = Path.replace

    def dying(path: Path, target: Path) -> Path:
        if path.name == "test.parquet":
            raise KeyboardInterrupt
        return replace(path, target)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", dying)
        patched.setattr(output_module.shutil, "rmtree", lambda *_, **__: None)
        write_source(source, [{"question": "other?", "answer": "#### 2"}, *ROWS])
        assert prepare(source, tmp_path / "out") == 130
    assert (tmp_path / "out" / "train.parquet").read_bytes() != old["train.parquet"]
    assert (tmp_path / "out" / "test.parquet").read_bytes() == old["test.parquet"]
    assert prepare(source, tmp_path / "out") == 0
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert describe_file(tmp_path / "out" / "test.parquet") == manifest["files"]["test.parquet"]
    assert not list((tmp_path / "out").glob(".apollo-*"))


def test_rows_are_written_in_groups(tmp_path: Path) -> None:
    rows = [{"question": f"{i}?", "answer": f"#### {i}"} for i in range(ROW_GROUP + 12)]
    assert prepare(write_source(tmp_path / "source", rows), tmp_path / "out") == 0
    train = pq.ParquetFile(tmp_path / "out" / "train.parquet")
    assert train.num_row_groups == 2 and train.metadata.num_rows == ROW_GROUP + 10
    assert train.read().column("answer").to_pylist() == [row["answer"] for row in rows[:-2]]

"""Files of a split, and rows of every kind of file."""

import json
from pathlib import Path

import pytest

from apollo_sft.errors import DataError
from apollo_sft.prepare.raw_sources import column_names, files_of_split, local_source, source_rows
from tests.support.data import write_parquet


@pytest.mark.parametrize(
    ("names", "files"),
    [
        (["test.parquet", "train.parquet"], ["train.parquet"]),
        (["train.jsonl", "train-notes.md"], ["train.jsonl"]),
        (["data/train-00001-of-2.parquet", "data/train-00000-of-2.parquet"], None),
        (["default/train/0001.parquet", "default/train/0000.parquet", "default/test/0000.parquet"], None),
        (["main/train-0.parquet", "socratic/train-0.parquet"], ["main/train-0.parquet"]),
        ([".cache/train.parquet", "train.json"], ["train.json"]),
    ],
)
def test_files_of_a_split(names: list[str], files: list[str] | None) -> None:
    expected = files or sorted(name for name in names if "train" in name)
    assert files_of_split(names, "train", "main", "here") == expected


def test_a_missing_split_names_what_is_there() -> None:
    with pytest.raises(DataError) as caught:
        files_of_split(["train.parquet", "validation.parquet"], "test", None, "folder")
    message = str(caught.value)
    assert "folder has no split 'test'" in message and "train.parquet, validation.parquet" in message
    assert "--splits" in message


@pytest.mark.parametrize("names", [["a/train.parquet", "b/train.parquet"], ["train.parquet", "train.jsonl"]])
def test_two_that_may_be_meant_are_an_error(names: list[str]) -> None:
    with pytest.raises(DataError, match=f"found: +{names[1] if 'jsonl' in names[1] else names[0]}"):
        files_of_split(names, "train", None, "folder")


def test_a_folder_of_save_to_disk_says_how_to_go_on(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    for name in ("dataset_info.json", "state.json", "data-00000-of-00001.arrow"):
        (tmp_path / "train" / name).write_text("{}")
    with pytest.raises(DataError, match="to_parquet"):
        local_source(tmp_path, ["train"], None)


def test_one_file_is_one_split(tmp_path: Path) -> None:
    file = Path(write_parquet(tmp_path / "rows.parquet", [{"question": "1"}]))
    assert local_source(file, ["train"], None).files == {"train": [file]}
    with pytest.raises(DataError, match="is one split"):
        local_source(file, ["train", "test"], None)
    with pytest.raises(DataError, match="no such file or folder"):
        local_source(tmp_path / "gone", ["train"], None)
    (tmp_path / "rows.csv").write_text("question\n1\n")
    with pytest.raises(DataError, match="unknown kind of file"):
        local_source(tmp_path / "rows.csv", ["train"], None)


def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path) -> None:
    rows = [{"question": f"{i}?", "answer": "ä"} for i in range(1200)]
    files = [
        Path(write_parquet(tmp_path / "a.parquet", rows)),
        *(tmp_path / n for n in ("b.jsonl", "c.json", "d.json")),
    ]
    lines = "\n".join(json.dumps(row) for row in rows)
    files[1].write_text(f"\ufeff{lines}\n\n", encoding="utf-8")
    files[2].write_text(f" \n{json.dumps(rows, indent=1)}", encoding="utf-8")
    files[3].write_text(lines, encoding="utf-8")
    for file in files:
        read = list(source_rows([file]))
        assert [row for _, row in read] == rows
        assert [ref.row for ref, _ in read] == list(range(1200)) and read[7][0].file == str(file)
        assert column_names(file) == ["question", "answer"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1}\n\n{"a": \n', "rows.jsonl line 3: not valid JSON"),
        ('{"a": 1}\n[2]\n', "rows.jsonl line 2: not an object"),
    ],
)
def test_a_bad_line_is_named(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(text)
    with pytest.raises(DataError, match=message):
        list(source_rows([tmp_path / "rows.jsonl"]))


def test_damaged_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 nothing")
    with pytest.raises(DataError, match=r"bad\.parquet: not a readable parquet file"):
        column_names(tmp_path / "bad.parquet")
    (tmp_path / "latin.jsonl").write_bytes('{"question": "\u00e4"}'.encode("latin-1"))
    with pytest.raises(DataError, match=r"latin\.jsonl: the text is not valid UTF-8"):
        list(source_rows([tmp_path / "latin.jsonl"]))
    (tmp_path / "list.json").write_text("[1]")
    with pytest.raises(DataError, match=r"list\.json row 0: not an object"):
        list(source_rows([tmp_path / "list.json"]))

import datetime
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from apollo_sft.data.read.files import Columns, expand_paths
from apollo_sft.data.read.rows import num_rows, read_rows
from apollo_sft.errors import DataError
from tests.support.data import write_parquet

QA = Columns(required=("q", "a"), optional=("tools",), keys={"q": "data.prompt_key", "a": "data.response_key"})


def rows(start: int, stop: int) -> list[dict[str, object]]:
    return [{"q": f"q{i}", "a": {"text": f"a{i}", "list": [i]}, "unread": b"\xff"} for i in range(start, stop)]


def test_rows_are_plain_python_and_know_their_place(tmp_path: Path) -> None:
    files = [write_parquet(tmp_path / "a.parquet", rows(0, 3)), write_parquet(tmp_path / "b.parquet", rows(3, 5))]
    read = list(read_rows(files, QA))
    places = [(files.index(ref.file), ref.row) for ref, _ in read]
    assert places == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]
    assert read[4][1] == {"q": "q4", "a": {"text": "a4", "list": [4]}}
    assert type(read[0][1]["a"]["list"]) is list
    assert num_rows(files) == 5


@pytest.mark.parametrize(("max_rows", "expected"), [(-1, 5), (0, 0), (2, 2), (4, 4), (9, 5)])
def test_max_rows_counts_over_all_files(tmp_path: Path, max_rows: int, expected: int) -> None:
    files = [write_parquet(tmp_path / "a.parquet", rows(0, 3)), write_parquet(tmp_path / "b.parquet", rows(3, 5))]
    assert len(list(read_rows(files, QA, max_rows))) == expected


def test_a_path_is_a_file_a_folder_or_a_glob(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    b = write_parquet(tmp_path / "b.parquet", rows(0, 1))
    a = write_parquet(tmp_path / "a.parquet", rows(0, 1))
    c = write_parquet(tmp_path / "deep" / "c.parquet", rows(0, 1))
    (tmp_path / "readme.md").write_text("no data")
    assert expand_paths([b, a], "data.train_files") == [b, a]
    assert expand_paths([str(tmp_path)], "data.train_files") == [a, b, c]
    assert expand_paths([str(tmp_path / "*.parquet")], "data.train_files") == [a, b]


def refused(paths: list[str], *said: str, key: str = "data.train_files") -> None:
    with pytest.raises(DataError) as caught:
        list(read_rows(expand_paths(paths, key), QA))
    for words in said:
        assert words in str(caught.value)


def test_what_is_missing_is_named_with_the_nearest_that_exists(tmp_path: Path) -> None:
    write_parquet(tmp_path / "train.parquet", rows(0, 1))
    refused([str(tmp_path / "train_.parquet")], "data.train_files: no such file", "did you mean", "train.parquet")
    refused([str(tmp_path / "x" / "*.parquet")], "data.val_files=null", key="data.val_files")
    (tmp_path / "empty").mkdir()
    refused([str(tmp_path / "empty")], "holds no data file")


def test_a_missing_column_names_those_that_exist(tmp_path: Path) -> None:
    file = write_parquet(tmp_path / "a.parquet", [{"q": "x", "aa": "y"}])
    refused([file], file, "'a' (data.response_key)", "columns q, aa", "data.response_key=aa")


def test_files_that_are_not_whole_parquet_are_refused(tmp_path: Path) -> None:
    text = tmp_path / "a.csv"
    text.write_text("q\nx\n")
    refused([str(text)], str(text), "not a readable parquet file", "convert it to parquet")
    whole = Path(write_parquet(tmp_path / "b.parquet", rows(0, 100))).read_bytes()
    cut = tmp_path / "cut.parquet"
    cut.write_bytes(whole[: len(whole) // 2])
    refused([str(cut)], str(cut), "not a readable parquet file")
    holed = bytearray(whole)
    holed[4:200] = bytes(196)
    damaged = tmp_path / "damaged.parquet"
    damaged.write_bytes(bytes(holed))
    refused([str(damaged)], str(damaged), "cannot be read after row 0")


def test_text_that_is_not_utf8_names_row_and_column(tmp_path: Path) -> None:
    good, bad = pa.array(["ok", "ok"]), pa.array([b"ok", b"\xed\xa0\x80"]).view(pa.string())
    pq.write_table(pa.table({"q": good, "a": bad}), tmp_path / "a.parquet")
    refused([str(tmp_path / "a.parquet")], "row 1, column a", "not valid UTF-8")


def test_odd_types_stay_what_arrow_says(tmp_path: Path) -> None:
    file = write_parquet(tmp_path / "a.parquet", [{"q": datetime.date(2024, 1, 1), "a": None}])
    assert next(read_rows([file], QA))[1] == {"q": datetime.date(2024, 1, 1), "a": None}


def test_cells_that_unpack_to_gigabytes_are_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "bomb.parquet"
    columns = {"a": ["x", "y" * (1 << 27)], "b": ["x", "y"]}
    pq.write_table(pa.table(columns), path, row_group_size=1, compression="zstd", use_dictionary=False)
    assert path.stat().st_size < 1 << 20
    with pytest.raises(DataError, match="rows 1 to 1, column a: the cells are too large"):
        list(read_rows([str(path)], Columns(("a",), (), {"a": "data.prompt_key"})))
    assert len(list(read_rows([str(path)], Columns(("b",), (), {"b": "data.prompt_key"})))) == 2


def test_one_large_text_for_many_rows_is_unpacked_a_few_rows_at_a_time(tmp_path: Path) -> None:
    """A dictionary holds it once: a file of some kilobytes would unpack to terabytes."""
    text, number = "x" * 2**24, 2000
    array = pa.DictionaryArray.from_arrays(pa.array([0] * number, pa.int32()), pa.array([text]))
    file = tmp_path / "a.parquet"
    pq.write_table(pa.table({"q": array, "a": array}), file)
    assert file.stat().st_size < 2_000_000
    read = read_rows([str(file)], QA)
    assert next(read)[1] == {"q": text, "a": text}
    assert pa.total_allocated_bytes() < 2 * 2**30

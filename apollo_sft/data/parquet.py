"""Files, folders and globs -> rows as plain Python values, in small batches: memory does not grow with the file."""

from __future__ import annotations

import difflib
import glob
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from apollo_sft.errors import DataError
from apollo_sft.types import RowRef

BATCH_ROWS = 512
READ_BUFFER_BYTES = 1 << 20
MAX_CELL_BYTES = 1 << 26
"""Mean size of the cells of a column in a row group, unpacked. A few kilobytes of file can claim gigabytes."""
MAX_BATCH_BYTES = 1 << 29
FEWEST_ROWS = 4

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Columns:
    """What is read of each file. `optional` columns are read where they exist. `keys` names the key of a column."""

    required: tuple[str, ...]
    optional: tuple[str, ...]
    keys: dict[str, str]


def expand_paths(paths: Sequence[str], key: str) -> list[str]:
    """The parquet files that `paths` name, in order: a file as it is, a folder's or a glob's files by name.

    Raises: DataError, naming `key`, when a path gives no file.
    """
    return [file for path in paths for file in _expand(path, key)]


def _expand(path: str, key: str) -> list[str]:
    if "://" in path:
        raise DataError(f"{key}: only local files can be read", found=path, fix="download the file first")
    if Path(path).is_file():
        return [path]
    folder = Path(path).is_dir()
    pattern = str(Path(glob.escape(path)) / "**" / "*.parquet") if folder else path
    found = sorted(name for name in glob.glob(pattern, recursive=True) if Path(name).is_file())  # noqa: PTH207
    if not found:
        raise _no_file(path, key, folder)
    return found


def _no_file(path: str, key: str, folder: bool) -> DataError:
    if folder:
        return DataError(f"{key}: the folder holds no *.parquet file", found=path)
    parent = Path(path).parent
    names = sorted(p.name for p in parent.iterdir()) if parent.is_dir() else []
    close = difflib.get_close_matches(Path(path).name, names, n=1)
    fix = f"did you mean {parent / close[0]}?" if close else None
    if fix is None and key == "data.val_files":
        fix = "data.val_files=null trains without validation"
    return DataError(f"{key}: no such file", found=path, expected="a parquet file, a folder or a glob", fix=fix)


def read_rows(files: Sequence[str], columns: Columns, max_rows: int = -1) -> Iterator[tuple[RowRef, Row]]:
    """Every row of `files` with its place, at most `max_rows` over all files (-1: all).

    A row holds str, int, float, bool, None, list, dict and what else Arrow has for odd column types; never numpy.

    Raises: DataError for a file that is not parquet, is damaged, or lacks a required column, and for text of a row
    that is not valid UTF-8.
    """
    for ref, row in try_rows(files, columns, max_rows):
        if isinstance(row, DataError):
            raise row
        yield ref, row


def try_rows(files: Sequence[str], columns: Columns, max_rows: int = -1) -> Iterator[tuple[RowRef, Row | DataError]]:
    """As `read_rows`, with the error of a row in its place. Raises: DataError for a file."""
    rows = ((RowRef(file, index), row) for file in files for index, row in enumerate(_read_file(file, columns)))
    return islice(rows, max_rows if max_rows >= 0 else None)


def num_rows(files: Sequence[str]) -> int:
    """Rows of all files together, from their footers."""
    return sum(_open(file).metadata.num_rows for file in files)


def column_names(file: str) -> list[str]:
    """Raises: DataError for a file that is not parquet."""
    names: list[str] = _open(file).schema_arrow.names
    return names


def _read_file(file: str, columns: Columns) -> Iterator[Row | DataError]:
    parquet = _open(file)
    names = _existing(file, parquet.schema_arrow.names, columns)
    _refuse_huge_cells(file, parquet.metadata, names)
    done = 0
    try:
        for batch in parquet.iter_batches(batch_size=_batch_rows(parquet.metadata, names), columns=names):
            yield from _to_python(file, batch, done)
            done += batch.num_rows
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            f"{file}: the file cannot be read after row {done}",
            found=str(error).splitlines()[0],
            fix="write the file again (with smaller row groups if cells are very large)",
        ) from error


def _batch_rows(metadata: Any, names: list[str]) -> int:
    """How many are read at a time. With a dictionary every row of a batch may be the largest text of its column."""
    chunks = [
        metadata.row_group(g).column(c) for g in range(metadata.num_row_groups) for c in range(metadata.num_columns)
    ]
    wanted = [chunk for chunk in chunks if chunk.path_in_schema.split(".")[0] in names and chunk.has_dictionary_page]
    largest = max((chunk.total_uncompressed_size for chunk in wanted), default=1)
    return int(max(FEWEST_ROWS, min(BATCH_ROWS, MAX_BATCH_BYTES // largest)))


def _refuse_huge_cells(file: str, metadata: Any, names: list[str]) -> None:
    first = 0
    for index in range(metadata.num_row_groups):
        group = metadata.row_group(index)
        for column in (group.column(at) for at in range(group.num_columns)):
            name = column.path_in_schema.split(".")[0]
            if name in names and column.total_uncompressed_size > MAX_CELL_BYTES * max(group.num_rows, 1):
                raise DataError(
                    f"{file} rows {first} to {first + group.num_rows - 1}, column {name}: the cells are too large",
                    found=f"{column.total_uncompressed_size:,} bytes in {group.num_rows:,} rows",
                    expected=f"at most {MAX_CELL_BYTES:,} bytes a cell",
                )
        first += group.num_rows


def _to_python(file: str, batch: Any, done: int) -> list[Row | DataError]:
    try:
        rows: list[Row | DataError] = batch.to_pylist()
    except UnicodeDecodeError:
        rows = [_one_row(file, batch, i, done) for i in range(batch.num_rows)]
    return rows


def _one_row(file: str, batch: Any, index: int, done: int) -> Row | DataError:
    """Row `index` of `batch`, column by column, so that an error can name its place."""
    row: Row = {}
    for name in batch.schema.names:
        try:
            row[name] = batch.column(name)[index].as_py()
        except UnicodeDecodeError as error:
            return DataError(f"{file} row {done + index}, column {name}: the text is not valid UTF-8", found=str(error))
    return row


def _open(file: str) -> Any:
    try:
        return pq.ParquetFile(file, buffer_size=READ_BUFFER_BYTES, pre_buffer=False)
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            f"{file}: not a readable parquet file",
            found=str(error).splitlines()[0],
            expected="parquet",
            fix="convert it to parquet" if Path(file).suffix in (".json", ".jsonl", ".csv", ".arrow") else None,
        ) from error


def _existing(file: str, present: list[str], columns: Columns) -> list[str]:
    for name in columns.required:
        if name in present:
            continue
        close = difflib.get_close_matches(name, present, n=1)
        key = columns.keys[name]
        raise DataError(
            f"{file} has no column {name!r} ({key})",
            found=f"columns {', '.join(present) or '(none)'}",
            fix=f"{key}={close[0]}" if close else f"set {key} to the column that is meant",
        )
    return [name for name in dict.fromkeys((*columns.required, *columns.optional)) if name in present]

"""Files -> rows as plain Python values, in small batches: memory does not grow with the file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from apollo_sft.data.read import json_lines
from apollo_sft.data.read.files import (
    READ_BYTES,
    REMOTE_READ_BYTES,
    Columns,
    Row,
    cause,
    expand_paths,
    filesystem,
    is_remote,
    kind_of,
    lacking,
    open_file,
    shown,
)
from apollo_sft.errors import DataError
from apollo_sft.types import RowRef

__all__ = ["Columns", "Row", "column_names", "expand_paths", "num_rows", "read_rows", "try_rows"]

BATCH_ROWS = 512
MAX_CELL_BYTES = 1 << 26
"""Mean size of the cells of a column in a row group, unpacked. A few kilobytes of file can claim gigabytes."""
MAX_BATCH_BYTES = 1 << 29
FEWEST_ROWS = 4
FILE_MAGIC = b"ARROW1"
END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"
"""Source: "IPC Streaming Format" in Arrow's columnar format: what a whole stream ends with."""
Found = Iterator[tuple[int, Row | DataError]]


def read_rows(files: Sequence[str], columns: Columns, max_rows: int = -1) -> Iterator[tuple[RowRef, Row]]:
    """Every row of `files` with its place, at most `max_rows` over all files (-1: all).

    A row holds str, int, float, bool, None, list, dict and what else Arrow has for odd column types; never numpy.

    Raises: DataError for a file that cannot be read, is damaged, or lacks a required column, and for a row that cannot
    be read.
    """
    for ref, row in try_rows(files, columns, max_rows):
        if isinstance(row, DataError):
            raise row
        yield ref, row


def try_rows(
    files: Sequence[str], columns: Columns, max_rows: int = -1, first_row: int = 0
) -> Iterator[tuple[RowRef, Row | DataError]]:
    """As `read_rows`, with the error of a row in its place, from row `first_row` of all files together on.

    What stands before that row is not read, but for its row group (parquet), its batch (Arrow), up to
    `json_lines.INDEX_ROWS` lines (JSON lines), or the file (compressed JSON lines).
    Raises: DataError for a file.
    """
    return islice(_from_row(files, columns, first_row), max_rows if max_rows >= 0 else None)


def num_rows(files: Sequence[str]) -> int:
    """Rows of all files together: from the footers of parquet; other files are read through. Raises: DataError."""
    return sum(map(_num_rows, files))


def column_names(file: str) -> list[str]:
    """The columns of a file; of JSON lines, the keys of the first row. Raises: DataError for a file."""
    kind = kind_of(file)
    if kind == "JSON lines":
        return json_lines.column_names(file)
    names: list[str] = (_open(file).schema_arrow if kind == "parquet" else _Arrow(file).schema).names
    return names


def _num_rows(file: str) -> int:
    kind = kind_of(file)
    if kind == "JSON lines":
        return json_lines.num_rows(file)
    if kind == "parquet":
        return int(_open(file).metadata.num_rows)
    return sum(batch.num_rows for batch in _pulled(file, _Arrow(file).batches(), 0))


def _from_row(files: Sequence[str], columns: Columns, first_row: int) -> Iterator[tuple[RowRef, Row | DataError]]:
    readers = {"parquet": _read_parquet, "JSON lines": json_lines.read_rows, "Arrow": _read_arrow}
    for file in files:
        here = _num_rows(file) if first_row else 1
        if first_row < here:
            name = shown(file)
            for index, row in readers[kind_of(file)](file, columns, first_row):
                yield RowRef(name, index), row
        first_row = max(first_row - here, 0) if first_row else 0


def _read_parquet(file: str, columns: Columns, first_row: int) -> Found:
    parquet = _open(file)
    metadata = parquet.metadata
    names = _existing(file, parquet.schema_arrow.names, columns)
    _refuse_huge_cells(file, metadata, names)
    sizes = [metadata.row_group(index).num_rows for index in range(metadata.num_row_groups)]
    group = at = 0
    while group < len(sizes) and at + sizes[group] <= first_row:
        at += sizes[group]
        group += 1
    groups = list(range(group, len(sizes)))
    batches = parquet.iter_batches(batch_size=_batch_rows(metadata, names), row_groups=groups, columns=names)
    for batch in _pulled(file, batches, at):
        wanted = batch.slice(max(first_row - at, 0))
        yield from _to_python(file, wanted, at + batch.num_rows - wanted.num_rows)
        at += batch.num_rows
    if at != metadata.num_rows:
        raise _unreadable(file, at, f"{at:,} of the {metadata.num_rows:,} rows of its footer")


def _read_arrow(file: str, columns: Columns, first_row: int) -> Found:
    arrow, at = _Arrow(file), 0
    names = _existing(file, arrow.schema.names, columns)
    for batch in _pulled(file, arrow.batches(names), 0):
        begin = max(first_row - at, 0)
        for part in _parts(file, batch, begin, at):
            yield from _to_python(file, part, at + begin)
            begin += part.num_rows
        at += batch.num_rows


def _pulled(file: str, batches: Iterator[Any], done: int) -> Iterator[Any]:
    """The batches. Raises: DataError for whatever Arrow, or the client of a store, raises."""
    while True:
        try:
            batch = next(batches, None)
        except Exception as error:
            raise _unreadable(file, done, cause(error)) from error
        if batch is None:
            return
        yield batch
        done += batch.num_rows


def _unreadable(file: str, done: int, found: str) -> DataError:
    again = "write the file again (with smaller row groups if cells are very large)"
    fix = "start again; if it stays, look at the file and the network" if is_remote(file) else again
    return DataError(f"{shown(file)}: the file cannot be read after row {done}", found=found, fix=fix)


def _batch_rows(metadata: Any, names: list[str]) -> int:
    """How many are read at a time. With a dictionary every row of a batch may be the largest text of its column."""
    chunks = [
        metadata.row_group(g).column(c) for g in range(metadata.num_row_groups) for c in range(metadata.num_columns)
    ]
    wanted = [chunk for chunk in chunks if chunk.path_in_schema.split(".")[0] in names and chunk.has_dictionary_page]
    return _rows_of(max((chunk.total_uncompressed_size for chunk in wanted), default=1))


def _rows_of(largest_cell_bytes: int) -> int:
    return int(max(FEWEST_ROWS, min(BATCH_ROWS, MAX_BATCH_BYTES // max(largest_cell_bytes, 1))))


def _refuse_huge_cells(file: str, metadata: Any, names: list[str]) -> None:
    first = 0
    for index in range(metadata.num_row_groups):
        group = metadata.row_group(index)
        for column in (group.column(at) for at in range(group.num_columns)):
            name = column.path_in_schema.split(".")[0]
            if name in names:
                _refuse_huge(file, name, column.total_uncompressed_size, first, group.num_rows)
        first += group.num_rows


def _refuse_huge(file: str, name: str, num_bytes: int, first: int, num_cells: int) -> None:
    if num_bytes > MAX_CELL_BYTES * max(num_cells, 1):
        raise DataError(
            f"{shown(file)} rows {first} to {first + num_cells - 1}, column {name}: the cells are too large",
            found=f"{num_bytes:,} bytes in {num_cells:,} rows",
            expected=f"at most {MAX_CELL_BYTES:,} bytes a cell",
        )


def _parts(file: str, batch: Any, begin: int, at: int) -> Iterator[Any]:
    """A batch of Arrow in parts of few rows, each of which is what its schema says."""
    dictionaries = [column.dictionary.nbytes for column in batch.columns if pa.types.is_dictionary(column.type)]
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        _refuse_huge(file, name, column.nbytes, at, batch.num_rows)
    size = _rows_of(max(dictionaries, default=1))
    for first in range(begin, batch.num_rows, size):
        yield batch.slice(first, size)


def _to_python(file: str, batch: Any, first: int) -> Iterator[tuple[int, Row | DataError]]:
    """(row, values), of which the first is row `first`."""
    try:
        batch.validate(full=True)
        rows: list[Row | DataError] = batch.to_pylist()
    except Exception:  # of damaged data it may be anything: each cell is looked at alone
        rows = [_one_row(file, batch, i, first) for i in range(batch.num_rows)]
    return zip(range(first, first + len(rows)), rows, strict=True)


def _one_row(file: str, batch: Any, index: int, first: int) -> Row | DataError:
    """Row `index` of `batch`, column by column, so that an error can name its place."""
    row: Row = {}
    for name in batch.schema.names:
        where = f"{shown(file)} row {first + index}, column {name}"
        cell = batch.column(name).slice(index, 1)
        try:
            cell.validate(full=True)
            row[name] = cell[0].as_py()
        except Exception as error:
            is_text = isinstance(error, UnicodeDecodeError) or "UTF8" in str(error)
            what = "the text is not valid UTF-8" if is_text else "the cell cannot be read"
            return DataError(f"{where}: {what}", found=cause(error))
    return row


def _open(file: str) -> Any:
    try:
        return pq.ParquetFile(
            _source(file),
            buffer_size=REMOTE_READ_BYTES if is_remote(file) else READ_BYTES,
            pre_buffer=False,
            page_checksum_verification=True,
        )
    except DataError:
        raise
    except Exception as error:
        convert = Path(file).suffix in (".csv", ".tsv", ".txt", ".xlsx", ".pkl")
        raise DataError(
            f"{shown(file)}: not a readable parquet file",
            found=cause(error),
            expected="parquet; or JSON lines (.jsonl) or Arrow (.arrow) by the extension",
            fix="convert it to parquet" if convert else None,
        ) from error


def _source(file: str) -> Any:
    """Parquet asks for ranges; a block around each of them would be read for nothing."""
    if not is_remote(file):
        return file
    fs, path = filesystem(file, "data")
    return fs.open(path, "rb", cache_type="none")


class _Arrow:
    """An IPC file, or a stream of them. Raises: DataError for a file that is neither, or a stream cut short."""

    def __init__(self, file: str) -> None:
        self._file = file
        try:
            self.schema = self._reader(None)[0].schema
        except DataError:
            raise
        except Exception as error:
            raise DataError(
                f"{shown(file)}: not a readable Arrow file",
                found=cause(error),
                expected="an IPC file or stream of Arrow (.feather: version 2)",
            ) from error

    def batches(self, names: Sequence[str] | None = None) -> Iterator[Any]:
        """Of these columns; None: of the first one, to count."""
        fields = [index for index, name in enumerate(self.schema.names) if names is None or name in names]
        reader, stream = self._reader(fields if names is not None else fields[:1])
        if stream is None:
            yield from (reader.get_batch(index) for index in range(reader.num_record_batches))
            return
        yield from reader
        if stream.tell() < stream.size():  # a read that gave nothing looks like the end
            raise pa.ArrowInvalid(f"it ended after {stream.tell():,} of {stream.size():,} bytes")

    def _reader(self, fields: list[int] | None) -> tuple[Any, Any]:
        """The reader; and of a stream what it reads from, None of a file."""
        options = pa.ipc.IpcReadOptions(included_fields=fields)
        source = pa.PythonFile(open_file(self._file), mode="r") if is_remote(self._file) else pa.memory_map(self._file)
        is_file = source.read(len(FILE_MAGIC)) == FILE_MAGIC
        if not is_file:
            source.seek(max(source.size() - len(END_OF_STREAM), 0))
            if source.read() != END_OF_STREAM:
                raise pa.ArrowInvalid("it does not end as a stream of Arrow does: it is cut short, or none")
        source.seek(0)
        if is_file:
            return pa.ipc.open_file(source, options=options), None
        return pa.ipc.open_stream(source, options=options), source


def _existing(file: str, present: list[str], columns: Columns) -> list[str]:
    wanted = dict.fromkeys((*columns.required, *columns.optional))
    for name in columns.required:
        if name not in present:
            raise lacking(shown(file), name, present, columns)
    twice = [name for name in wanted if present.count(name) > 1]
    if twice:
        raise DataError(
            f"{shown(file)} has {present.count(twice[0])} columns of the name {twice[0]!r}",
            found=f"columns {', '.join(present)}",
            fix="write the file again with one of them",
        )
    return [name for name in wanted if name in present]

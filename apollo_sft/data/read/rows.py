"""Files -> rows as plain Python values, in small batches: memory does not grow with the file."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Protocol, cast

from apollo_sft.data.read.files import Columns, Found, Kind, Row, kind_of, shown
from apollo_sft.errors import DataError
from apollo_sft.types import RowRef

READERS: dict[Kind, str] = {"parquet": "parquet", "JSON lines": "json_lines", "Arrow": "arrow"}
"""The module of this folder that reads a kind of files. It is loaded for the first file of the kind."""


class Reader(Protocol):
    """The functions of a module that reads one kind of files. All raise DataError for a file."""

    def read_rows(self, file: str, columns: Columns, first_row: int) -> Found:
        """Yield (row, values, or the error of that row) from row `first_row` on."""

    def num_rows(self, file: str) -> int:
        """Count the rows."""

    def column_names(self, file: str) -> list[str]:
        """List the columns."""


def read_rows(files: Sequence[str], columns: Columns, max_rows: int = -1) -> Iterator[tuple[RowRef, Row]]:
    """Yield every row of `files` with its place, at most `max_rows` over all files (-1: all).

    A row holds str, int, float, bool, None, list, dict and the Python types of Arrow for other columns; never numpy.

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
    """Yield rows as `read_rows` does, with the error of a row in its place, from row `first_row` of all files on.

    Rows before that one are not read, but for its row group (parquet), its batch (Arrow), up to
    `json_lines.INDEX_ROWS` lines (JSON lines), or the file (compressed JSON lines).
    Raises: DataError for a file.
    """
    rows = _from_row(files, columns, first_row)
    if max_rows < 0:
        return rows
    return islice(rows, max_rows)


def num_rows(files: Sequence[str]) -> int:
    """Count the rows of all files: from the footers of parquet; other files are read through. Raises: DataError."""
    return sum(_reader(file).num_rows(file) for file in files)


def column_names(file: str) -> list[str]:
    """List the columns of a file; of JSON lines, the keys of the first row. Raises: DataError for a file."""
    return _reader(file).column_names(file)


def _reader(file: str) -> Reader:
    return cast(Reader, importlib.import_module(f"apollo_sft.data.read.{READERS[kind_of(file)]}"))


def _from_row(files: Sequence[str], columns: Columns, first_row: int) -> Iterator[tuple[RowRef, Row | DataError]]:
    skipped = first_row
    for file in files:
        reader = _reader(file)
        # Counting may read the whole file, so it is done only as long as rows are skipped.
        if skipped:
            count = reader.num_rows(file)
            if skipped >= count:
                skipped -= count
                continue

        name = shown(file)
        for index, row in reader.read_rows(file, columns, skipped):
            yield RowRef(name, index), row
        skipped = 0

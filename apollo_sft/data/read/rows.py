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
"""The module of this folder that reads a kind of files. It is loaded when a file of the kind is there."""


class Reader(Protocol):
    """What a module that reads one kind of files has. All raise DataError for a file."""

    def read_rows(self, file: str, columns: Columns, first_row: int) -> Found:
        """Yield (row, values, or the error of that row) from row `first_row` on."""

    def num_rows(self, file: str) -> int: ...

    def column_names(self, file: str) -> list[str]: ...


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
    return sum(_reader(file).num_rows(file) for file in files)


def column_names(file: str) -> list[str]:
    """List the columns of a file; of JSON lines, the keys of the first row. Raises: DataError for a file."""
    return _reader(file).column_names(file)


def _reader(file: str) -> Reader:
    return cast(Reader, importlib.import_module(f"apollo_sft.data.read.{READERS[kind_of(file)]}"))


def _from_row(files: Sequence[str], columns: Columns, first_row: int) -> Iterator[tuple[RowRef, Row | DataError]]:
    for file in files:
        reader = _reader(file)
        here = reader.num_rows(file) if first_row else 1
        if first_row < here:
            name = shown(file)
            for index, row in reader.read_rows(file, columns, first_row):
                yield RowRef(name, index), row
        first_row = max(first_row - here, 0) if first_row else 0

"""Read JSON lines into rows of plain Python values, a line at a time: memory does not grow with the file."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from functools import lru_cache
from math import isfinite
from typing import Any, BinaryIO, NoReturn, cast

import pyarrow as pa

from apollo_sft.data.read.files import (
    READ_BYTES,
    Columns,
    Row,
    cause,
    compression_of,
    lacking,
    open_file,
    reached,
    shown,
    size_of,
    stamp,
)
from apollo_sft.errors import DataError

MAX_LINE_BYTES = 1 << 26
MAX_BLANK_LINES = 1 << 20
"""Blank lines that follow one another. Some kilobytes, compressed, can hold gigabytes of them."""

INDEX_ROWS = 4096
CACHED_INDICES = 64
BOM = b"\xef\xbb\xbf"
SHOWN_CHARACTERS = 80
EXPECTED = '{"question": …, "answer": …} on each line'


@dataclass(frozen=True, slots=True)
class _Start:
    """A place in a file where reading may begin."""

    rows: int
    """Rows before it."""

    line: int
    """Lines before it, blank ones too."""

    byte: int


START_OF_FILE = _Start(0, 0, 0)


@dataclass(slots=True)
class _Line:
    """One line of a file."""

    number: int
    """From 0, blank lines count too."""

    text: bytes

    byte: int
    """Where it begins."""

    @property
    def is_blank(self) -> bool:
        return not self.text or self.text.isspace()


@dataclass(slots=True)
class _Index:
    """The number of rows of a file, and places where reading may begin."""

    num_rows: int = 0

    starts: list[_Start] = field(default_factory=lambda: [START_OF_FILE])
    """One for every `INDEX_ROWS` rows."""


def num_rows(file: str) -> int:
    """Count the lines that are not blank. The file is read through once, and again when it has changed.

    Raises: DataError for a file that cannot be read.
    """
    return _index_of(file).num_rows


def read_rows(file: str, columns: Columns, first_row: int) -> Iterator[tuple[int, Row | DataError]]:
    """Yield (line, row) from row `first_row` on; the error of a row in its place. Lines count from 0, blank ones too.

    Raises: DataError for a file that cannot be read.
    """
    start = START_OF_FILE
    if first_row:
        start = next(start for start in reversed(_index_of(file).starts) if start.rows <= first_row)

    rows = start.rows
    for line in _lines(file, start):
        if rows >= first_row:
            yield line.number, _row(file, line, columns)
        rows += 1


def column_names(file: str) -> list[str]:
    """List the keys of the first row; [] where there is none. Raises: DataError for a row that cannot be read."""
    for line in _lines(file, START_OF_FILE):
        return list(_parsed(file, line))
    return []


def _index_of(file: str) -> _Index:
    what = f"{shown(file)}: the file cannot be read"
    return _index(file, reached(lambda: stamp(file), what))


@lru_cache(CACHED_INDICES)
def _index(file: str, stamp: str | None) -> _Index:
    """Return the index of a file. With another `stamp` a file that was written again is another entry of the cache."""
    del stamp
    index = _Index()
    is_seekable = compression_of(file) is None
    for line in _lines(file, START_OF_FILE):
        if is_seekable and index.num_rows and index.num_rows % INDEX_ROWS == 0:
            index.starts.append(_Start(index.num_rows, line.number, line.byte))
        index.num_rows += 1
    return index


def _lines(file: str, start: _Start) -> Iterator[_Line]:
    """Yield the lines that are not blank, from `start` on."""
    return (line for line in _all_lines(file, start) if not line.is_blank)


def _all_lines(file: str, start: _Start) -> Iterator[_Line]:
    """Yield the lines from `start` on. Raises: DataError where they end before the file does."""
    number = start.line
    byte = start.byte
    num_blank = 0
    what = f"{shown(file)}: the file cannot be read"
    expected = None
    if compression_of(file) is None:
        expected = reached(lambda: size_of(file), what)

    with closing(reached(lambda: _open_at(file, byte), what)) as stream:
        while True:
            if number:
                what = f"{shown(file)}: the file cannot be read after row {number - 1}"
            # One byte more than is allowed: a longer line is recognised without reading it to its end.
            text = reached(lambda: stream.readline(MAX_LINE_BYTES + 1), what)
            if not text:
                break
            num_blank = num_blank + 1 if text.isspace() else 0
            _refuse_line(f"{shown(file)} row {number}", text, num_blank)

            bare = text.removeprefix(BOM) if number == 0 else text
            yield _Line(number, bare, byte)
            number += 1
            byte += len(text)

    # A connection that is lost looks like the end of the file.
    if expected is not None and byte < expected:
        raise DataError(what, found=f"it ended after {byte:,} of {expected:,} bytes", fix="start again")


def _refuse_line(where: str, text: bytes, num_blank: int) -> None:
    if len(text) > MAX_LINE_BYTES:
        raise DataError(f"{where}: the line is too long", expected=f"{MAX_LINE_BYTES:,} bytes")
    if num_blank > MAX_BLANK_LINES:
        raise DataError(f"{where}: too many blank lines", expected=f"at most {MAX_BLANK_LINES:,}")


def _open_at(file: str, byte: int) -> BinaryIO:
    raw = open_file(file)
    compression = compression_of(file)
    if compression is not None:
        raw = cast(BinaryIO, pa.CompressedInputStream(pa.PythonFile(raw, mode="r"), compression))
    elif byte:
        raw.seek(byte)

    # Reading lines from a stream without a buffer would read single bytes.
    if not isinstance(raw, io.BufferedReader):
        raw = cast(BinaryIO, io.BufferedReader(cast(Any, raw), READ_BYTES))
    return raw


def _row(file: str, line: _Line, columns: Columns) -> Row | DataError:
    try:
        parsed = _parsed(file, line)
    except DataError as error:
        return error

    for name in columns.required:
        if name not in parsed:
            return lacking(f"{shown(file)} row {line.number}", name, list(parsed), columns)
    return {name: parsed[name] for name in (*columns.required, *columns.optional) if name in parsed}


def _parsed(file: str, line: _Line) -> Row:
    """Parse one line. Raises: DataError naming the row."""
    where = f"{shown(file)} row {line.number} (line {line.number + 1})"
    text = _decoded(file, line)
    try:
        row = json.loads(text, parse_constant=_refuse, parse_float=_finite, object_pairs_hook=_object)
    except RecursionError as error:
        raise DataError(f"{where}: it is nested too deeply") from error
    except ValueError as error:
        fix = None
        if line.number == 0 and text.lstrip().startswith("["):
            fix = "write each object on a line of its own: jq -c '.[]' FILE > FILE.jsonl"
        found = cause(error)
        if isinstance(error, json.JSONDecodeError):
            found = f"{error.msg} at character {error.pos}"
        raise DataError(f"{where}: not valid JSON", found=found, expected=EXPECTED, fix=fix) from error

    if isinstance(row, dict):
        return row
    fix = None
    if isinstance(row, list):
        fix = "jq -c '.[]' FILE > FILE.jsonl"
    raise DataError(f"{where}: not an object", found=text.strip()[:SHOWN_CHARACTERS], expected=EXPECTED, fix=fix)


def _decoded(file: str, line: _Line) -> str:
    try:
        return line.text.decode()
    except UnicodeDecodeError as error:
        where = f"{shown(file)} row {line.number}"
        column = _column_of_bytes(line.text)
        if column:
            where += f", column {column}"
        raise DataError(f"{where}: the text is not valid UTF-8", found=f"byte {error.start}: {error.reason}") from error


def _column_of_bytes(line: bytes) -> str | None:
    """Return the first column with bytes that are no UTF-8, where the rest is JSON."""
    try:
        row = json.loads(line.decode(errors="surrogateescape"))
    except (ValueError, RecursionError):
        return None

    if not isinstance(row, dict):
        return None
    for name, value in row.items():
        # A name with such bytes could not be shown.
        if _has_escaped(value) and not _has_escaped(name):
            return str(name)
    return None


def _has_escaped(value: Any) -> bool:
    return any("\udc80" <= character <= "\udcff" for character in json.dumps(value, ensure_ascii=False))


def _refuse(literal: str) -> NoReturn:
    raise ValueError(f"{literal} is not JSON")


def _finite(literal: str) -> float:
    value = float(literal)
    if not isfinite(value):
        _refuse(literal)
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice[:SHOWN_CHARACTERS]!r} stands twice in one object")
    return found

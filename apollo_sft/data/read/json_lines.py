"""JSON lines -> rows as plain Python values, a line at a time: memory does not grow with the file."""

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
"""In a row. Some kilobytes, compressed, can hold gigabytes of nothing."""
INDEX_ROWS = 4096
KEPT_INDICES = 64
BOM = b"\xef\xbb\xbf"
SHOWN_CHARACTERS = 80
EXPECTED = '{"question": …, "answer": …} on each line'


@dataclass(slots=True)
class _Index:
    """`starts`: every so many rows (number of rows before, line, byte) where reading may begin."""

    num_rows: int = 0
    starts: list[tuple[int, int, int]] = field(default_factory=lambda: [(0, 0, 0)])


def num_rows(file: str) -> int:
    """Lines that are not blank. The file is read through once, and again when it has changed.

    Raises: DataError for a file that cannot be read.
    """
    return _index_of(file).num_rows


def read_rows(file: str, columns: Columns, first_row: int) -> Iterator[tuple[int, Row | DataError]]:
    """(line, row) from row `first_row` on; the error of a row in its place. Lines count from 0, blank ones too.

    Raises: DataError for a file that cannot be read.
    """
    rows, line, byte = next(start for start in reversed(_starts(file, first_row)) if start[0] <= first_row)
    for number, text in _lines(file, line, byte):
        if rows >= first_row:
            yield number, _row(file, number, text, columns)
        rows += 1


def column_names(file: str) -> list[str]:
    """The keys of the first row. Raises: DataError when there is none."""
    for number, text in _lines(file, 0, 0):
        return list(_parsed(file, number, text))
    return []


def _starts(file: str, first_row: int) -> list[tuple[int, int, int]]:
    return _index_of(file).starts if first_row else [(0, 0, 0)]


def _index_of(file: str) -> _Index:
    what = f"{shown(file)}: the file cannot be read"
    return _index(file, reached(lambda: stamp(file), what))


@lru_cache(KEPT_INDICES)
def _index(file: str, stamp: str | None) -> _Index:
    """`stamp` makes another file of one that was written again."""
    del stamp
    index, seekable = _Index(), compression_of(file) is None
    for number, text, byte in _all_lines(file, 0, 0):
        if _is_blank(text):
            continue
        if seekable and index.num_rows and index.num_rows % INDEX_ROWS == 0:
            index.starts.append((index.num_rows, number, byte))
        index.num_rows += 1
    return index


def _lines(file: str, line: int, byte: int) -> Iterator[tuple[int, bytes]]:
    """(line, text) of the lines that are not blank, from that line on, which begins at that byte."""
    return ((number, text) for number, text, _ in _all_lines(file, line, byte) if not _is_blank(text))


def _is_blank(text: bytes) -> bool:
    return not text or text.isspace()


def _all_lines(file: str, line: int, byte: int) -> Iterator[tuple[int, bytes, int]]:
    """(line, text, byte where it begins). What ends before the file does is an error, not the end."""
    what, blank = f"{shown(file)}: the file cannot be read", 0
    expected = reached(lambda: size_of(file), what) if compression_of(file) is None else None
    with closing(reached(lambda: _open_at(file, byte), what)) as stream:
        while True:
            what = f"{shown(file)}: the file cannot be read after row {line - 1}" if line else what
            text = reached(lambda: stream.readline(MAX_LINE_BYTES + 1), what)
            if not text:
                break
            if len(text) > MAX_LINE_BYTES:
                raise DataError(f"{shown(file)} row {line}: the line is too long", expected=f"{MAX_LINE_BYTES:,} bytes")
            blank = blank + 1 if text.isspace() else 0
            if blank > MAX_BLANK_LINES:
                raise DataError(f"{shown(file)} row {line}: too many blank lines", expected=f"at most {blank - 1:,}")
            yield line, text.removeprefix(BOM) if not line else text, byte
            line, byte = line + 1, byte + len(text)
    if expected is not None and byte < expected:
        raise DataError(what, found=f"it ended after {byte:,} of {expected:,} bytes", fix="start again")


def _open_at(file: str, byte: int) -> BinaryIO:
    raw, compression = open_file(file), compression_of(file)
    if compression is not None:
        raw = cast(BinaryIO, pa.CompressedInputStream(pa.PythonFile(raw, mode="r"), compression))
    elif byte:
        raw.seek(byte)
    return cast(BinaryIO, raw if isinstance(raw, io.BufferedReader) else io.BufferedReader(cast(Any, raw), READ_BYTES))


def _row(file: str, number: int, text: bytes, columns: Columns) -> Row | DataError:
    try:
        parsed = _parsed(file, number, text)
    except DataError as error:
        return error
    for name in columns.required:
        if name not in parsed:
            return lacking(f"{shown(file)} row {number}", name, list(parsed), columns)
    return {name: parsed[name] for name in (*columns.required, *columns.optional) if name in parsed}


def _parsed(file: str, number: int, line: bytes) -> Row:
    """Raises: DataError naming the row."""
    where = f"{shown(file)} row {number} (line {number + 1})"
    try:
        text = line.decode()
    except UnicodeDecodeError as error:
        column = _column_of_bytes(line)
        at = f"{shown(file)} row {number}" + (f", column {column}" if column else "")
        raise DataError(f"{at}: the text is not valid UTF-8", found=f"byte {error.start}: {error.reason}") from error
    try:
        row = json.loads(text, parse_constant=_refuse, parse_float=_finite, object_pairs_hook=_object)
    except RecursionError as error:
        raise DataError(f"{where}: it is nested too deeply") from error
    except ValueError as error:
        whole = text.lstrip()
        is_list = number == 0 and whole.startswith("[")
        fix = "write each object on a line of its own: jq -c '.[]' FILE > FILE.jsonl" if is_list else None
        found = f"{error.msg} at character {error.pos}" if isinstance(error, json.JSONDecodeError) else cause(error)
        raise DataError(f"{where}: not valid JSON", found=found, expected=EXPECTED, fix=fix) from error
    if not isinstance(row, dict):
        found = text.strip()[:SHOWN_CHARACTERS]
        fix = "jq -c '.[]' FILE > FILE.jsonl" if isinstance(row, list) else None
        raise DataError(f"{where}: not an object", found=found, expected=EXPECTED, fix=fix)
    return row


def _column_of_bytes(line: bytes) -> str | None:
    """The first column with bytes that are no UTF-8, where the rest is JSON."""
    try:
        row = json.loads(line.decode(errors="surrogateescape"))
    except (ValueError, RecursionError):
        return None
    items = row.items() if isinstance(row, dict) else ()
    return next((name for name, value in items if _has_escaped(value) and not _has_escaped(name)), None)


def _has_escaped(value: Any) -> bool:
    return any("\udc80" <= character <= "\udcff" for character in json.dumps(value, ensure_ascii=False))


def _refuse(literal: str) -> NoReturn:
    raise ValueError(f"{literal} is not JSON")


def _finite(literal: str) -> float:
    value = float(literal)
    return value if isfinite(value) else _refuse(literal)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice[:SHOWN_CHARACTERS]!r} stands twice in one object")
    return found

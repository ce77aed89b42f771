"""Check values of cells, and word errors about them: file, row, column and message."""

from __future__ import annotations

import json
from functools import lru_cache
from itertools import chain
from typing import Any, NoReturn

from apollo_sft.data.read.files import known_kind
from apollo_sft.errors import DataError
from apollo_sft.types import RowRef

MAX_LEVELS = 100
MAX_SHOWN_CHARACTERS = 120
SCALARS = (str, int, float, bool, type(None))


class Place:
    """The position of a value in the data: file, row, column, and message of a list of messages."""

    def __init__(self, ref: RowRef, column: str, message: int | None = None, keeps_nulls: bool | None = None) -> None:
        self.ref = ref
        self.column = column
        self.message = message
        self.keeps_nulls = _is_json(ref.file) if keeps_nulls is None else keeps_nulls
        """A null in a struct is meant: in JSON, not where a columnar file fills missing fields."""

    def of_message(self, index: int) -> Place:
        """Return the place of message `index` in this cell."""
        return Place(self.ref, self.column, index, self.keeps_nulls)

    def of_json(self) -> Place:
        """Return the same place for values that were parsed from JSON text."""
        return Place(self.ref, self.column, self.message, keeps_nulls=True)

    def fail(self, what: str, *, found: object = None, expected: object = None, fix: str | None = None) -> NoReturn:
        """Raise a DataError that begins with this place."""
        message = ""
        if self.message is not None:
            message = f", message {self.message}"

        raise DataError(f"{self.ref}, column {self.column}{message}: {what}", found=found, expected=expected, fix=fix)


def parse_truth(cell: Any, place: Place, default: bool | None, fix: str | None = None) -> bool | None:
    """Return the truth value in `cell`, `default` where it is null."""
    if cell is None:
        return default
    if isinstance(cell, int | float) and cell in (0, 1):
        return bool(cell)
    if not isinstance(cell, bool):
        place.fail("not a truth value", found=brief(cell), expected="true, false or null", fix=fix)
    return cell


def parse_json(text: str, place: Place) -> Any:
    """Parse JSON text, without the literals NaN and Infinity that Python accepts."""

    def refuse(literal: str) -> NoReturn:
        raise ValueError(f"{literal} is not JSON")

    try:
        return json.loads(text, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        place.fail("the text is not valid JSON", found=f"{error}: {brief(text)}")


def check_value(value: Any, place: Place, depth: int = 0) -> None:
    """Check that a value holds only what JSON can hold, and only text that can be encoded."""
    if depth > MAX_LEVELS:
        place.fail("a value is nested too deeply", expected=f"at most {MAX_LEVELS} levels")

    if isinstance(value, str):
        # Nearly all text is ASCII, which cannot hold a surrogate: the cheap test first.
        if not value.isascii():
            _check_text(value, place)
    elif isinstance(value, dict):
        for item in chain.from_iterable(value.items()):
            if type(item) is not str or not item.isascii():
                check_value(item, place, depth + 1)
    elif isinstance(value, list):
        for item in value:
            check_value(item, place, depth + 1)
    elif not isinstance(value, SCALARS):
        place.fail("a value is not text, number, truth value, list or struct", found=brief(value))


def drop_nulls(value: Any) -> Any:
    """Remove the keys of dicts whose value is null, at every depth."""
    if isinstance(value, list):
        return [drop_nulls(item) for item in value]
    if not isinstance(value, dict):
        return value

    kept = {}
    for key, item in value.items():
        if type(item) is str:  # the usual value, without another call
            kept[key] = item
        elif item is not None:
            kept[key] = drop_nulls(item)
    return kept


def brief(value: Any) -> str:
    """Return type and value in at most about `MAX_SHOWN_CHARACTERS` characters, for messages."""
    shown = repr(value)
    if len(shown) > MAX_SHOWN_CHARACTERS:
        shown = f"{shown[: MAX_SHOWN_CHARACTERS - 3]}…"
    return f"{type(value).__name__} {shown}"


@lru_cache(64)
def _is_json(file: str) -> bool:
    return known_kind(file) == "JSON lines"


def _check_text(text: str, place: Place) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        place.fail(f"character {error.start} is a lone surrogate", found=f"U+{code:04X}", expected="valid Unicode")

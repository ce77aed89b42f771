"""The types of keys: the values that they may have, and the spellings that are accepted for them."""

from __future__ import annotations

import os
import re
from datetime import date
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, Discriminator, Field, Tag

from apollo_sft.config.keys import Frozen

SAVE_FREQUENCIES = "-1, a number of steps such as 200, epoch, or minutes such as 30min"
ALL_OR_SOME = "-1, or 1 and more"


def as_tuple(value: Any) -> Any:
    """Read a list; one text or dict as a list of one; null as an empty one."""
    if value is None:
        return ()
    if isinstance(value, str | dict):
        return (value,)
    if isinstance(value, list):
        return tuple(value)
    return value


def expand(value: Any) -> Any:
    """Expand `~` and environment variables in paths."""
    if isinstance(value, str):
        return os.path.expandvars(os.path.expanduser(value))  # noqa: PTH111 - a URL is no Path
    if isinstance(value, list | tuple):
        return [expand(item) for item in value]
    return value


def save_frequency(value: Any) -> Any:
    """Accept -1, a number of steps, `epoch`, or minutes."""
    # In Python true is an int, too.
    if isinstance(value, int) and not isinstance(value, bool):
        readable = value == -1 or value >= 1
    else:
        readable = isinstance(value, str) and re.fullmatch(r"epoch|[1-9][0-9]*min", value) is not None

    if not readable:
        raise ValueError(SAVE_FREQUENCIES)
    return value


def all_or_some(value: int) -> int:
    """Accept -1 for all, or 1 and more."""
    if value != -1 and value < 1:
        raise ValueError(ALL_OR_SOME)
    return value


def first_and_last(value: tuple[int, ...]) -> tuple[int, ...]:
    """Accept an empty range, or two steps in order."""
    if value and (len(value) != 2 or value[0] > value[1]):
        raise ValueError("null, or the first and the last step, such as [10,12]")
    return value


def day(value: str) -> str:
    """Accept a day such as 2025-01-31."""
    date.fromisoformat(value)
    return value


def _name(value: str) -> str:
    if re.fullmatch(r"[A-Za-z0-9_.-]+", value) is None:
        raise ValueError("letters, digits and _ . -: it becomes part of the names of metrics")
    return value


def _branch(value: Any) -> str:
    """Return which of the two kinds an entry of a list of files is, as pydantic's tag."""
    return "source" if isinstance(value, dict | BaseModel) else "path"


def lower(value: Any) -> Any:
    """Accept upper case: verl writes AdamW."""
    return value.lower() if isinstance(value, str) else value


def short_dtype(value: Any) -> Any:
    """Accept the long names of dtypes: verl writes bfloat16 and bf16."""
    if not isinstance(value, str):
        return value
    long_names = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32", "float64": "fp64"}
    return long_names.get(value, value)


Text = Annotated[str, Field(min_length=1)]
Strings = Annotated[
    tuple[Text, ...], BeforeValidator(as_tuple), Field(description="a text, or a list of them; or null")
]
PathText = Annotated[Text, BeforeValidator(expand), Field(description="a path")]
Paths = Annotated[
    tuple[Text, ...],
    BeforeValidator(as_tuple),
    BeforeValidator(expand),
    Field(description="a path, or a list of them; or null"),
]
Count = Annotated[int, Field(ge=1)]
CountOrAll = Annotated[int, AfterValidator(all_or_some), Field(description=ALL_OR_SOME)]
Share = Annotated[float, Field(ge=0, le=1)]


class FileSet(Frozen):
    """Files that are counted apart from others, under a name: their own, or one that `sources.named` derives."""

    path: Annotated[Paths, Field(min_length=1)]
    name: Annotated[Text, AfterValidator(_name)] | None = None


class Source(FileSet):
    """A part of a mixture, with at most one of the two numbers, see data.mixture."""

    weight: Annotated[float, Field(gt=0)] | None = None
    max_samples: Count | None = None


TrainFiles = Annotated[
    tuple[
        Annotated[Annotated[Text, Tag("path")] | Annotated[Source, Tag("source")], Discriminator(_branch)],
        ...,
    ],
    BeforeValidator(as_tuple),
    BeforeValidator(expand),
    Field(description="a path, or a list of paths and of {path, weight or max_samples, name}; or null"),
]
ValFiles = Annotated[
    tuple[
        Annotated[Annotated[Text, Tag("path")] | Annotated[FileSet, Tag("source")], Discriminator(_branch)],
        ...,
    ],
    BeforeValidator(as_tuple),
    BeforeValidator(expand),
    Field(description="a path, or a list of paths, or of {path, name}; or null"),
]

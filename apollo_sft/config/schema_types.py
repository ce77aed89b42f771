"""The types of keys: what a value may be, and the spellings that are accepted for it."""

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
    """A list, one text or dict for a list of one, or nothing."""
    if value is None:
        return ()
    if isinstance(value, str | dict):
        return (value,)
    return tuple(value) if isinstance(value, list) else value


def expand(value: Any) -> Any:
    """`~` and environment variables in paths."""
    if isinstance(value, str):
        return os.path.expandvars(os.path.expanduser(value))  # noqa: PTH111 - a URL is no Path
    return [expand(item) for item in value] if isinstance(value, list | tuple) else value


def save_frequency(value: Any) -> Any:
    if isinstance(value, int) and not isinstance(value, bool):
        readable = value == -1 or value >= 1
    else:
        readable = isinstance(value, str) and re.fullmatch(r"epoch|[1-9][0-9]*min", value) is not None
    if not readable:
        raise ValueError(SAVE_FREQUENCIES)
    return value


def all_or_some(value: int) -> int:
    if value != -1 and value < 1:
        raise ValueError(ALL_OR_SOME)
    return value


def first_and_last(value: tuple[int, ...]) -> tuple[int, ...]:
    if value and (len(value) != 2 or value[0] > value[1]):
        raise ValueError("null, or the first and the last step, such as [10,12]")
    return value


def day(value: str) -> str:
    date.fromisoformat(value)
    return value


def _name(value: str) -> str:
    if re.fullmatch(r"[A-Za-z0-9_.-]+", value) is None:
        raise ValueError("letters, digits and _ . -: it becomes part of the names of metrics")
    return value


def _branch(value: Any) -> str:
    """Which of the two kinds an entry of a list of files is."""
    return "source" if isinstance(value, dict | BaseModel) else "path"


def lower(value: Any) -> Any:
    """verl writes AdamW."""
    return value.lower() if isinstance(value, str) else value


def short_dtype(value: Any) -> Any:
    """verl writes bfloat16 and bf16."""
    long_names = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32", "float64": "fp64"}
    return long_names.get(value, value) if isinstance(value, str) else value


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
    """Files that are counted apart from others, under a name. `named` in config.sources says how they are called."""

    path: Annotated[Paths, Field(min_length=1)]
    name: Annotated[Text, AfterValidator(_name)] | None = None


class Source(FileSet):
    """A part of a mixture; data.mixture says what the two numbers mean. At most one of them is given."""

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

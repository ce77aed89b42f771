"""What a report says, without how it looks: `screen` shows it in a terminal, `page` as HTML."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Level = Literal["good", "look", "bad"]


@dataclass(frozen=True, slots=True)
class Figures:
    """The few numbers that matter, in the order in which one follows from the other: (number, what it counts)."""

    items: Sequence[tuple[str, str]]


@dataclass(frozen=True, slots=True)
class Facts:
    """(name, value) line by line."""

    title: str
    rows: Sequence[tuple[str, str]]


@dataclass(frozen=True, slots=True)
class Table:
    """`words`: columns of text, the others hold numbers. `totals`: rows that sum up others."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: frozenset[int] = frozenset({0})
    totals: frozenset[int] = frozenset()
    note: str = ""


@dataclass(frozen=True, slots=True)
class Bars:
    """A histogram: (label, count)."""

    title: str
    bars: Sequence[tuple[str, int]]
    note: str = ""


@dataclass(frozen=True, slots=True)
class Note:
    """One finding. `examples`: where it was met first."""

    level: Level
    text: str
    examples: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class Notes:
    title: str
    notes: Sequence[Note]


@dataclass(frozen=True, slots=True)
class Token:
    """A piece of text and the token it is; several, where only together they are characters."""

    text: str
    ids: tuple[int, ...]
    is_target: bool
    is_control: bool


@dataclass(frozen=True, slots=True)
class Passage:
    """The tokens of one sample. `whole`: nothing of it is shortened."""

    title: str
    note: str
    tokens: Sequence[Token]
    whole: bool = False


@dataclass(frozen=True, slots=True)
class Passages:
    title: str
    passages: Sequence[Passage]


Block = Figures | Facts | Table | Bars | Notes | Passages


@dataclass(frozen=True, slots=True)
class Document:
    title: str
    subtitle: str
    blocks: Sequence[Block]

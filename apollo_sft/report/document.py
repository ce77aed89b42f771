"""The content of a report, without its form: `screen` shows it in a terminal, `page` as HTML."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Level = Literal["good", "warning", "bad"]


@dataclass(frozen=True, slots=True)
class Figures:
    """The few numbers that matter."""

    items: Sequence[tuple[str, str]]
    """(number, what it counts)."""
    chain: bool = True
    """Each number follows from the one before it: they are shown with arrows between them."""


@dataclass(frozen=True, slots=True)
class Facts:
    """Names with their values, line by line."""

    title: str
    rows: Sequence[tuple[str, str]]
    more_title: str = ""
    more: Sequence[tuple[str, str]] = ()
    """Lines that are collapsed on a page, under `more_title`, and not shown in a terminal."""


@dataclass(frozen=True, slots=True)
class Table:
    """A table."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: frozenset[int] = frozenset({0})
    """The columns of text; the others hold numbers."""
    totals: frozenset[int] = frozenset()
    """The rows that sum up others."""
    note: str = ""


@dataclass(frozen=True, slots=True)
class Bars:
    """A histogram."""

    title: str
    bars: Sequence[tuple[str, int]]
    """(label, count)."""
    note: str = ""


@dataclass(frozen=True, slots=True)
class Note:
    """One finding."""

    level: Level
    text: str
    examples: Sequence[str] = ()
    """The first places where it was found."""


@dataclass(frozen=True, slots=True)
class Notes:
    """A list of findings."""

    title: str
    notes: Sequence[Note]


@dataclass(frozen=True, slots=True)
class Token:
    """A piece of text and its token, or several tokens that are characters only together."""

    text: str
    ids: tuple[int, ...]
    is_target: bool
    is_control: bool


@dataclass(frozen=True, slots=True)
class Passage:
    """The tokens of one sample."""

    title: str
    note: str
    tokens: Sequence[Token]
    whole: bool = False
    """Nothing of it is shortened in a terminal."""


@dataclass(frozen=True, slots=True)
class Passages:
    """A list of samples."""

    title: str
    passages: Sequence[Passage]


@dataclass(frozen=True, slots=True)
class Curve:
    """One metric of one run."""

    name: str
    points: Sequence[tuple[int, float]]
    """(step, value), steps ascending."""
    colour: int
    """The number of a colour: that of its run."""
    sparse: bool = False
    """It has few points, and every point has a dot."""


@dataclass(frozen=True, slots=True)
class Plot:
    """Curves over the steps."""

    title: str
    curves: Sequence[Curve]
    unit: str = ""
    from_zero: bool = False
    """The axis begins at 0."""
    may_be_log: bool = False
    """The axis is logarithmic when the values differ by a large factor."""
    noisy: bool = True
    """A moving mean is drawn too."""


@dataclass(frozen=True, slots=True)
class Plots:
    """Several plots, of which the first one is wide."""

    title: str
    plots: Sequence[Plot]
    note: str = ""
    """How to read them."""


@dataclass(frozen=True, slots=True)
class Reply:
    """The replies of a model to one prompt."""

    prompt: str
    expected: str
    """The reply in the data."""
    texts: Sequence[tuple[str, str]]
    """(when, text), the last one first."""


@dataclass(frozen=True, slots=True)
class Replies:
    """A list of prompts with their replies."""

    title: str
    replies: Sequence[Reply]
    note: str = ""


Block = Figures | Facts | Table | Bars | Notes | Passages | Plots | Replies


@dataclass(frozen=True, slots=True)
class Document:
    """A whole report."""

    title: str
    subtitle: str
    blocks: Sequence[Block]

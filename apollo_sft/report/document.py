"""What a report says, without how it looks: `screen` shows it in a terminal, `page` as HTML."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Level = Literal["good", "look", "bad"]


@dataclass(frozen=True, slots=True)
class Figures:
    """The few numbers that matter: (number, what it counts). `chain`: one follows from the other in this order."""

    items: Sequence[tuple[str, str]]
    chain: bool = True


@dataclass(frozen=True, slots=True)
class Facts:
    """(name, value) line by line. `more`: lines that are folded up on a page, under `more_title`."""

    title: str
    rows: Sequence[tuple[str, str]]
    more_title: str = ""
    more: Sequence[tuple[str, str]] = ()


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


@dataclass(frozen=True, slots=True)
class Curve:
    """(step, value), steps ascending. `colour`: a number, that of its run. `sparse`: every point has a dot."""

    name: str
    points: Sequence[tuple[int, float]]
    colour: int
    sparse: bool = False


@dataclass(frozen=True, slots=True)
class Plot:
    """Curves over the steps. `from_zero`: the axis begins at 0. `may_be_log`: it is logarithmic where values span it.

    `noisy`: a moving mean is drawn too.
    """

    title: str
    curves: Sequence[Curve]
    unit: str = ""
    from_zero: bool = False
    may_be_log: bool = False
    noisy: bool = True


@dataclass(frozen=True, slots=True)
class Plots:
    """The first one is wide. `note`: how to read them."""

    title: str
    plots: Sequence[Plot]
    note: str = ""


@dataclass(frozen=True, slots=True)
class Reply:
    """What a model said to one prompt: (when, text), the last one first. `expected`: what the data say."""

    prompt: str
    expected: str
    said: Sequence[tuple[str, str]]


@dataclass(frozen=True, slots=True)
class Replies:
    title: str
    replies: Sequence[Reply]
    note: str = ""


Block = Figures | Facts | Table | Bars | Notes | Passages | Plots | Replies


@dataclass(frozen=True, slots=True)
class Document:
    title: str
    subtitle: str
    blocks: Sequence[Block]

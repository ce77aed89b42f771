"""A report in a terminal. Nothing is shown by colour alone: targets are between brackets."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any, Literal

from rich.console import Console, Group, RenderableType
from rich.rule import Rule
from rich.table import Table as Grid
from rich.text import Text

from apollo_sft.redact import redact
from apollo_sft.report.document import Bars, Block, Document, Facts, Figures, Notes, Passage, Passages, Table, Token

TARGET_START = "⟦"
TARGET_END = "⟧"
BAR_WIDTH = 40
PLAIN_WIDTH = 120
"""Width of what is written to a file or a pipe."""
SHORT_CONTEXT = 400
"""Number of characters of a stretch without targets beyond which its middle is left out."""
SHORT_TARGET = 1200
"""The same number for a stretch of targets."""
SIGNS = {"good": ("✓", "green"), "warning": ("!", "yellow"), "bad": ("✗", "bold red")}
TARGET = "bold green"
CONTROL = "cyan"
CONTEXT = "dim"
NUMBER = "dim italic"
LEGEND = f"{TARGET_START}{TARGET_END} is what is trained"


def screen() -> Console:
    """Return a console on stdout: as wide as the terminal, or wide enough for a file."""
    width = PLAIN_WIDTH
    if sys.stdout.isatty():
        width = shutil.get_terminal_size().columns

    # None: rich decides by the terminal.
    no_color = True if os.environ.get("NO_COLOR") else None
    return Console(highlight=False, width=width, no_color=no_color)


def show(document: Document, console: Console, ids: bool = False) -> None:
    """Print a report. `ids`: with token ids."""
    console.print(Text(redact(document.title), style="bold"))
    console.print(Text(redact(document.subtitle), style="dim"))
    for block in document.blocks:
        for part in _parts(block, ids):
            console.print(part, soft_wrap=isinstance(part, Text))


def _parts(block: Block, ids: bool) -> Iterator[RenderableType]:
    if isinstance(block, Passages):
        for passage in block.passages:
            yield from _passage(passage, ids)
        return

    shown = _shown(block)
    if shown is not None:
        yield ""
        yield shown


def _shown(block: Block) -> RenderableType | None:
    """Draw one block; None for a list without an entry, of which the title is left out too."""
    if isinstance(block, Figures):
        return Text("  →  ").join(Text.assemble((number, "bold"), " ", name) for number, name in block.items)
    if isinstance(block, Facts):
        return _titled(block.title, _grid((), block.rows, frozenset({0, 1}), ["", "bold"]))
    if isinstance(block, Bars):
        return _titled(block.title, _bars(block), block.note)

    if isinstance(block, Notes):
        if not block.notes:
            return None
        return _titled(block.title, Group(*_notes(block)))

    if isinstance(block, Table):
        if not block.rows:
            return None
        return _titled(block.title, _table(block), block.note)

    raise TypeError(type(block))


def _titled(title: str, body: RenderableType, note: str = "") -> Group:
    parts: list[RenderableType] = [Text(title, style="bold cyan"), body]
    if note:
        parts.append(Text(f"  {note}", style="dim"))
    return Group(*parts)


def _grid(header: Sequence[str], rows: Any, words: frozenset[int], styles: Sequence[str] = ()) -> Grid:
    """Make a table without lines. `words`: columns of text, which are on the left and may be broken."""
    grid = Grid(box=None, show_header=bool(header), pad_edge=True, padding=(0, 2, 0, 0), header_style="dim")
    grid.add_column("")  # an empty one, as an indentation

    for index in range(len(header) or 2):
        side: Literal["left", "right"] = "left" if index in words else "right"
        style = styles[index] if styles else ""
        name = header[index] if header else ""
        grid.add_column(name, justify=side, style=style, overflow="fold", no_wrap=index not in words)

    for row in rows:
        grid.add_row("", *(Text(redact(cell)) for cell in row))
    return grid


def _table(table: Table) -> Grid:
    grid = _grid(table.header, table.rows, table.words)
    for index in table.totals:
        grid.rows[index].style = "bold"
    return grid


def _bars(block: Bars) -> Grid:
    most = max((count for _, count in block.bars), default=0)

    grid = Grid.grid(padding=(0, 1))
    sides: tuple[Literal["left", "right"], ...] = ("left", "right", "left", "right")
    for side in sides:
        grid.add_column(justify=side)

    for label, count in block.bars:
        grid.add_row("", Text(label, style="dim"), Text(_bar(count, most), style="green"), f"{count:,}")
    return grid


def _bar(count: int, most: int) -> str:
    """Draw a bar in eighths of a character; a small count is still visible."""
    if count == 0:
        return ""
    eighths = max(round(8 * BAR_WIDTH * count / most), 1)
    return "█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8].strip()


def _notes(block: Notes) -> Iterator[RenderableType]:
    for note in block.notes:
        sign, style = SIGNS[note.level]
        lines = redact(note.text).splitlines()
        # Only what is bad is coloured beyond its sign: a page of yellow text would hide it.
        text_style = style if note.level == "bad" else ""
        yield Text.assemble("  ", (sign, style), " ", (lines[0], text_style))
        yield from (Text(f"    {line}") for line in lines[1:])
        yield from (Text(f"      {example}", style="dim") for example in note.examples)


def _passage(passage: Passage, ids: bool) -> Iterator[RenderableType]:
    yield ""
    yield Rule(Text(redact(passage.title), style="bold cyan"), align="left", style="dim")
    note = passage.note
    if passage.tokens:
        note = f"{note}; {LEGEND}"

    yield Text(redact(note), style="italic")

    text = Text()
    for is_target, group in groupby(passage.tokens, key=lambda token: token.is_target):
        tokens = list(group)
        if not passage.whole:
            tokens = _shortened(tokens, SHORT_TARGET if is_target else SHORT_CONTEXT)

        if is_target:
            text.append(TARGET_START, style=TARGET)

        for token in tokens:
            text.append(token.text, style=_style(token, is_target))
            if ids:
                text.append("".join(f"‹{number}›" for number in token.ids), style=NUMBER)

        if is_target:
            text.append(TARGET_END, style=TARGET)

    yield text


def _style(token: Token, is_target: bool) -> str:
    if is_target:
        return TARGET
    if token.is_control:
        return CONTROL
    return CONTEXT


def _shortened(tokens: list[Token], limit: int) -> list[Token]:
    """Leave out the middle of tokens with more than `limit` characters together."""
    total = sum(len(token.text) for token in tokens)
    if total <= limit:
        return tokens

    head = _until(tokens, limit // 2)
    tail = _until(tokens[::-1], limit // 2)[::-1]
    num_left_out = len(tokens) - len(head) - len(tail)
    gap = Token(f" … {num_left_out:,} tokens … ", (), tokens[0].is_target, True)
    return [*head, gap, *tail]


def _until(tokens: list[Token], characters: int) -> list[Token]:
    """Return the first tokens, of at most so many characters together."""
    kept = 0
    length = 0
    for token in tokens:
        length += len(token.text)
        if length > characters:
            break
        kept += 1
    return tokens[:kept]

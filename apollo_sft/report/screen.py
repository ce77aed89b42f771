"""A report in a terminal. Without colour it says the same: targets stand between brackets."""

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

TARGET_START, TARGET_END = "⟦", "⟧"
BAR_WIDTH = 40
PLAIN_WIDTH = 120
SHORT_CONTEXT, SHORT_TARGET = 400, 1200
"""Characters of a stretch beyond which its middle is left out."""
SIGNS = {"good": ("✓", "green"), "look": ("!", "yellow"), "bad": ("✗", "bold red")}
TARGET, CONTROL, CONTEXT, NUMBER = "bold green", "cyan", "dim", "dim italic"
LEGEND = f"{TARGET_START}{TARGET_END} is what is trained"


def screen() -> Console:
    """stdout: as wide as the terminal, or wide enough for a file."""
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else PLAIN_WIDTH
    return Console(highlight=False, width=width, no_color=True if os.environ.get("NO_COLOR") else None)


def show(document: Document, console: Console, ids: bool = False) -> None:
    """`ids`: token ids too."""
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
    if isinstance(block, Figures):
        return Text("  →  ").join(Text.assemble((number, "bold"), " ", name) for number, name in block.items)
    if isinstance(block, Facts):
        return _titled(block.title, _grid((), block.rows, frozenset({0, 1}), ["", "bold"]))
    if isinstance(block, Bars):
        return _titled(block.title, _bars(block), block.note)
    if isinstance(block, Notes):
        return _titled(block.title, Group(*_notes(block))) if block.notes else None
    if isinstance(block, Table):
        return _titled(block.title, _table(block), block.note) if block.rows else None
    raise TypeError(type(block))


def _titled(title: str, body: RenderableType, note: str = "") -> Group:
    return Group(Text(title, style="bold cyan"), body, *([Text(f"  {note}", style="dim")] if note else []))


def _grid(header: Sequence[str], rows: Any, words: frozenset[int], styles: Sequence[str] = ()) -> Grid:
    grid = Grid(box=None, show_header=bool(header), pad_edge=True, padding=(0, 2, 0, 0), header_style="dim")
    grid.add_column("")
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
    """In eighths of a character; never nothing for something."""
    eighths = round(8 * BAR_WIDTH * count / most) if most else 0
    eighths = max(eighths, 1) if count else 0
    return "█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8].strip()


def _notes(block: Notes) -> Iterator[RenderableType]:
    for note in block.notes:
        sign, style = SIGNS[note.level]
        lines = redact(note.text).splitlines()
        yield Text.assemble("  ", (sign, style), " ", (lines[0], style if note.level == "bad" else ""))
        yield from (Text(f"    {line}") for line in lines[1:])
        yield from (Text(f"      {example}", style="dim") for example in note.examples)


def _passage(passage: Passage, ids: bool) -> Iterator[RenderableType]:
    yield ""
    yield Rule(Text(redact(passage.title), style="bold cyan"), align="left", style="dim")
    yield Text(redact(f"{passage.note}; {LEGEND}" if passage.tokens else passage.note), style="italic")
    text = Text()
    for is_target, tokens in groupby(passage.tokens, key=lambda token: token.is_target):
        text.append(TARGET_START if is_target else "", style=TARGET)
        for token in _shortened(list(tokens), None if passage.whole else is_target):
            style = TARGET if is_target else CONTROL if token.is_control else CONTEXT
            text.append(token.text, style=style)
            text.append("".join(f"‹{number}›" for number in token.ids) if ids else "", style=NUMBER)
        text.append(TARGET_END if is_target else "", style=TARGET)
    yield text


def _shortened(tokens: list[Token], is_target: bool | None) -> list[Token]:
    """Without its middle where it is long. None: all of it."""
    limit = {None: sys.maxsize, True: SHORT_TARGET, False: SHORT_CONTEXT}[is_target]
    total = sum(len(token.text) for token in tokens)
    if total <= limit:
        return tokens
    head, tail = _until(tokens, limit // 2), _until(tokens[::-1], limit // 2)[::-1]
    left = len(tokens) - len(head) - len(tail)
    return [*head, Token(f" … {left:,} tokens … ", (), bool(is_target), True), *tail]


def _until(tokens: list[Token], characters: int) -> list[Token]:
    """The first ones, of at most so many characters together."""
    kept, length = 0, 0
    for token in tokens:
        length += len(token.text)
        if length > characters:
            break
        kept += 1
    return tokens[:kept]

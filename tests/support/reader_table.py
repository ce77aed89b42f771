"""What must be the same where a reader opens a base and the export of its training; the table of all of it."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tests.support.base_templates import TEXTS
from tests.support.readers import Answer, error_of

Said = dict[str, Any]
TOLERANCE = 1e-4
"""Of logits in fp32."""

SHOWN = 160
BY_TEXT = {
    "ids": "ids",
    "plain": "ids without special tokens",
    "decoded": "decoded text",
    "clean": "decoded text without special tokens",
}


@dataclass
class Cell:
    """A family by a reader: what is `red`, what is `skipped` because the base is not opened, what is only noted."""

    red: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    noted: list[str] = field(default_factory=list)

    @property
    def word(self) -> str:
        if self.red:
            return "RED"
        return {0: "ok", 1: "part"}.get(len(self.skipped), "skipped")


Table = dict[str, dict[str, Cell]]


def judge(base: Answer, export: Answer, pinned: Answer, added: Sequence[str] = ()) -> Cell:
    """Compare what one reader says of a base and of its export. `pinned`: the pinned reader, of the export.

    `added`: tokens that the training added; texts with one of them are compared with the pinned reader.
    """
    cell = Cell()
    if (failure := base.failure("tokenizer")) is not None:
        cell.skipped.append(f"the base's tokenizer: {failure}")
    elif (failure := export.failure("tokenizer")) is not None:
        cell.red.append(f"the tokenizer does not open: {failure} (at {export.said['tokenizer'].get('at')})")
    else:
        cell.red += _of_tokenizers(base.said, export.said, pinned.said, added)
        cell.noted += _of_settings(base.said, export.said, added)
    if (failure := base.failure("model")) is not None:
        cell.skipped.append(f"the base's model: {failure}")
    elif (failure := export.failure("model")) is not None:
        cell.red.append(f"the model does not open: {failure} (at {export.said['model'].get('at')})")
    else:
        cell.red += [*_of_models(base.said, export.said, pinned.said), *_of_logits(export, pinned)]
    return cell


def _of_tokenizers(base: Said, export: Said, pinned: Said, added: Sequence[str]) -> Iterator[str]:
    """List texts and conversations that come out otherwise than of the base."""
    grown = _with_added(added)
    for key, name in BY_TEXT.items():
        expected = [pinned[key][place] if place in grown else value for place, value in enumerate(base[key])]
        wrong = [place for place, value in enumerate(export[key]) if value != expected[place]]
        if wrong:
            first = wrong[0]
            yield (
                f"{name} of {len(wrong)} texts ({', '.join(map(str, wrong[:8]))}), first of {TEXTS[first]!r}: "
                f"{_short(export[key][first])} is not {_short(expected[first])}"
            )
    for which, text in base["rendered"].items():
        found, wanted = _rendered(export["rendered"][which]), _rendered(text)
        if found != wanted:
            yield f"conversation {which} is rendered as {_short(found)}, not {_short(wanted)}"
            break


def _with_added(added: Sequence[str]) -> set[int]:
    """Number the texts that hold a token that the training added."""
    return {place for place, text in enumerate(TEXTS) if any(one in text for one in added)}


def _rendered(value: Any) -> str:
    return f"({error_of(value)})" if error_of(value) is not None else str(value)


def _of_settings(base: Said, export: Said, added: Sequence[str]) -> Iterator[str]:
    """List differences that change no ids: named tokens, the side of padding, what the slow tokenizer says."""
    for name, value in base["named"].items():
        if export["named"][name] != value:
            yield f"{name} {export['named'][name]!r}, base {value!r}"
    for key in ("length", "side", "longest"):
        if export[key] != base[key]:
            yield f"{key} {export[key]}, base {base[key]}"
    lost = sorted(set(base["special"]) - set(export["special"]))
    gained = sorted(set(export["special"]) - set(base["special"]))
    if lost or gained:
        yield f"special tokens: lost {lost}, gained {gained}"
    if base["slow"] is not None and error_of(base["slow"]) is None:
        same = set(range(len(TEXTS))) - _with_added(added)
        if (failure := error_of(export["slow"])) is not None:
            yield f"use_fast=False: {failure}"
        elif any(export["slow"][place] != base["slow"][place] for place in same):
            yield "use_fast=False: other ids"


def _of_models(base: Said, export: Said, pinned: Said) -> Iterator[str]:
    """List what differs of the loaded model and its answers; logits are looked at elsewhere."""
    for key, name in {"model": "class", "dtype": "dtype by 'auto'", "loading": "weights not found"}.items():
        if export[key] != base[key]:
            yield f"{name}: {_short(export[key])} is not {_short(base[key])}"
    if more := sorted(set(export["unexpected"]) - set(base["unexpected"])):
        yield f"weights that the model has no place for: {more[:3]}"
    if export["stops"] != pinned["stops"]:
        yield f"stops of generation: {export['stops']} is not {pinned['stops']}"
    found, wanted = ([_ending(one) for one in said.get("generated", [])] for said in (export, pinned))
    if found != wanted or not wanted:
        yield f"greedy answers end by (stop, tokens) {found}, not {wanted}"


def _ending(answer: dict[str, Any]) -> Any:
    return error_of(answer) or (answer["stop"], len(answer["ids"]))


def _of_logits(export: Answer, pinned: Answer) -> Iterator[str]:
    """Say how far the logits are from those of the pinned reader."""
    if export.logits is None or pinned.logits is None:
        yield f"no logits: {_short(export.said.get('logits'))}, pinned {_short(pinned.said.get('logits'))}"
    elif export.logits.shape != pinned.logits.shape:
        yield f"logits of shape {export.logits.shape}, not {pinned.logits.shape}"
    else:
        difference = float(np.abs(export.logits - pinned.logits).max())
        if not difference <= TOLERANCE:
            yield f"logits differ by {difference:.2e}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}…"


def show(table: Table, readers: Sequence[str]) -> str:
    """Write the table of families and readers, and below it what is behind each cell that is not plain."""
    width = max(len(name) for name in table)
    lines = [" ".join([" " * width, *(f"{reader:>12}" for reader in readers)])]
    for family, cells in table.items():
        lines.append(" ".join([family.ljust(width), *(f"{cells[reader].word:>12}" for reader in readers)]))
    for kind in ("red", "skipped", "noted"):
        for family, cells in table.items():
            lines += [f"{kind}: {family} by {one}: {text}" for one in readers for text in getattr(cells[one], kind)]
    return "\n".join(lines)


def red(table: Mapping[str, Mapping[str, Cell]]) -> list[str]:
    """List the red cells, each with the first thing that differs."""
    return [f"{name} by {one}: {cell.red[0]}" for name, row in table.items() for one, cell in row.items() if cell.red]

"""A report as one HTML file that needs no network, no script and no other file."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from html import escape
from itertools import groupby, pairwise

from apollo_sft.redact import redact
from apollo_sft.report import curves
from apollo_sft.report.document import (
    Bars,
    Block,
    Document,
    Facts,
    Figures,
    Note,
    Notes,
    Passage,
    Passages,
    Plots,
    Replies,
    Reply,
    Table,
    Token,
)
from apollo_sft.report.page_style import STYLE

FOLDED_CHARACTERS = 600
"""A longer stretch that is no target is folded up in its middle."""
KEPT_CHARACTERS = 200
SIGNS = {"good": "✓", "look": "!", "bad": "✗"}
CHART_WIDTH, CHART_HEIGHT, LABEL_HEIGHT, COUNT_HEIGHT = 960, 180, 26, 18
HEAD = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="color-scheme" content="light dark">
"""
"""The policy is the second fence around the data: even what is not escaped can run and load nothing."""


def html(document: Document) -> str:
    """The whole page. Every text of the document is escaped."""
    parts = [HEAD, f"<title>{_text(document.title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"]
    parts.append(f"<header><h1>{_text(document.title)}</h1><p>{_text(document.subtitle)}</p></header>\n")
    parts += [_block(block) for block in document.blocks]
    parts.append("</main>\n</body>\n</html>\n")
    return "".join(parts)


def _block(block: Block) -> str:
    if isinstance(block, Figures):
        return _figures(block)
    if isinstance(block, Passages):
        return _passages(block) if block.passages else ""
    if isinstance(block, Facts):
        return _section(block.title, _facts(block))
    if isinstance(block, Plots):
        return _section(block.title, f'<div class="plots">{"".join(map(curves.svg, block.plots))}</div>', block.note)
    if isinstance(block, Replies):
        replies = "".join(map(_reply, block.replies))
        return _section(block.title, replies, block.note) if block.replies else ""
    if isinstance(block, Bars):
        return _section(block.title, _chart(block), block.note)
    if isinstance(block, Notes):
        notes = "".join(_note(note) for note in block.notes)
        return _section(block.title, f'<ul class="notes">{notes}</ul>') if block.notes else ""
    return _section(block.title, _table(block), block.note) if block.rows else ""


def _section(title: str, body: str, note: str = "") -> str:
    foot = f'<p class="foot">{_text(note)}</p>' if note else ""
    return f"<section><h2>{_text(title)}</h2>{body}{foot}</section>\n"


def _figures(block: Figures) -> str:
    tiles = (f"<div><strong>{_text(number)}</strong><span>{_text(name)}</span></div>" for number, name in block.items)
    if block.chain:
        return f'<div class="figures">{"<i>→</i>".join(tiles)}</div>\n'
    return f'<div class="figures apart">{"".join(tiles)}</div>\n'


def _facts(block: Facts) -> str:
    more = f"<summary>{_text(block.more_title)}</summary>{_pairs(block.more)}" if block.more else ""
    return _pairs(block.rows) + (f'<details class="more">{more}</details>' if more else "")


def _pairs(rows: Sequence[tuple[str, str]]) -> str:
    return f"<dl>{''.join(f'<dt>{_text(name)}</dt><dd>{_text(value)}</dd>' for name, value in rows)}</dl>"


def _reply(reply: Reply) -> str:
    """The latest text, and folded up what was said before."""
    (when, text), *earlier = reply.said
    said = _pairs([("prompt", reply.prompt), ("in the data", reply.expected), (when, text)])
    if earlier:
        said += f'<details class="more"><summary>{len(earlier)} earlier</summary>{_pairs(earlier)}</details>'
    return f'<article class="reply">{said}</article>'


def _note(note: Note) -> str:
    first, *rest = note.text.splitlines()
    more = f"<pre>{_text(chr(10).join(rest))}</pre>" if rest else ""
    examples = "".join(f"<li>{_text(example)}</li>" for example in note.examples)
    examples = f"<ul>{examples}</ul>" if examples else ""
    sign = f'<b class="sign">{SIGNS[note.level]}</b>'
    return f'<li class="{note.level}">{sign}<div>{_text(first)}{more}{examples}</div></li>'


def _table(table: Table) -> str:
    classes = ["words" if index in table.words else "number" for index in range(len(table.header))]
    head = "".join(f'<th class="{name}">{_text(cell)}</th>' for name, cell in zip(classes, table.header, strict=True))
    rows = []
    for index, row in enumerate(table.rows):
        cells = "".join(f'<td class="{name}">{_cell(cell)}</td>' for name, cell in zip(classes, row, strict=True))
        rows.append(f'<tr class="total">{cells}</tr>' if index in table.totals else f"<tr>{cells}</tr>")
    body = f"<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody>"
    return f'<div class="wide"><table>{body}</table></div>'


def _cell(text: str) -> str:
    """Keys and paths may be broken after a dot, a line or a slash, before they are broken anywhere."""
    return re.sub(r"(?<=[._/])(?=[^\W\d])", "<wbr>", _text(text))


def _chart(block: Bars) -> str:
    most = max((count for _, count in block.bars), default=0) or 1
    step = CHART_WIDTH / max(len(block.bars), 1)
    base = COUNT_HEIGHT + CHART_HEIGHT
    shapes = []
    for index, (label, count) in enumerate(block.bars):
        height = max(CHART_HEIGHT * count / most, 1.5 if count else 0)
        left, middle = index * step, (index + 0.5) * step
        shapes.append(
            f"<g><title>{_text(label)}: {count:,}</title>"
            f'<rect x="{left + step * 0.08:.1f}" y="{base - height:.1f}" width="{step * 0.84:.1f}" '
            f'height="{height:.1f}" rx="3"/>'
            f'<text x="{middle:.1f}" y="{base - height - 5:.1f}" class="count">{f"{count:,}" if count else ""}</text>'
            f'<text x="{middle:.1f}" y="{base + 17}">{_text(label)}</text></g>'
        )
    size = f"0 0 {CHART_WIDTH} {base + LABEL_HEIGHT}"
    line = f'<line x1="0" x2="{CHART_WIDTH}" y1="{base}" y2="{base}"/>'
    return f'<svg viewBox="{size}" role="img" aria-label="{_text(block.title)}">{"".join(shapes)}{line}</svg>'


def _passages(block: Passages) -> str:
    switch = "token boundaries; ids under the pointer"
    switch = f'<label class="switch"><input type="checkbox" class="tokens"> {switch}</label>'
    legend = f'<p class="legend"><mark>what is trained</mark> <span>what the model only reads</span>{switch}</p>'
    return _section(block.title, legend + "".join(_passage(passage) for passage in block.passages))


def _passage(passage: Passage) -> str:
    pieces = []
    for is_target, tokens in groupby(passage.tokens, key=lambda token: token.is_target):
        inside = "".join(_tokens(list(tokens), is_target))
        pieces.append(f"<mark>{inside}</mark>" if is_target else inside)
    head = f"<h3>{_cell(passage.title)}</h3><p>{_text(passage.note)}</p>"
    shown = f'<div class="sample">{"".join(pieces)}</div>' if passage.tokens else ""
    return f"<article>{head}{shown}</article>"


def _tokens(tokens: Sequence[Token], is_target: bool) -> Iterator[str]:
    total = sum(len(token.text) for token in tokens)
    if is_target or total <= FOLDED_CHARACTERS:
        yield from map(_token, tokens)
        return
    ends = [0]
    for token in tokens:
        ends.append(ends[-1] + len(token.text))
    head = sum(end <= KEPT_CHARACTERS for end in ends[1:])
    tail = sum(start >= total - KEPT_CHARACTERS for start, _ in pairwise(ends))
    middle = tokens[head : len(tokens) - tail]
    yield from map(_token, tokens[:head])
    yield f"<details><summary>{len(middle):,} more tokens</summary>{''.join(map(_token, middle))}</details>"
    yield from map(_token, tokens[len(tokens) - tail :])


def _token(token: Token) -> str:
    """Line ends are shown as well: in a target they are something that is learned."""
    text = escape(token.text)
    if token.is_target:
        text = text.replace("\n", '<span class="end">↵</span>\n')
    kind = "t control" if token.is_control else "t"
    ids = ", ".join(map(str, token.ids))
    return f'<span class="{kind}" title="{ids}">{text}</span>'


def _text(text: str) -> str:
    return escape(redact(text))

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
"""In a stretch without targets that is longer than this, the middle is collapsed."""
KEPT_CHARACTERS = 200
"""The part at each end of such a stretch that stays visible."""
SIGNS = {"good": "✓", "warning": "!", "bad": "✗"}
CHART_WIDTH = 960
CHART_HEIGHT = 180
LABEL_HEIGHT = 26
COUNT_HEIGHT = 18
HEAD = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="color-scheme" content="light dark">
"""
"""The policy is the second protection against hostile data: even what is not escaped can run and load nothing."""


def html(document: Document) -> str:
    """Build the whole page. Every text of the document is escaped."""
    parts = [HEAD, f"<title>{_text(document.title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"]
    parts.append(f"<header><h1>{_text(document.title)}</h1><p>{_text(document.subtitle)}</p></header>\n")
    parts += [_block(block) for block in document.blocks]
    parts.append("</main>\n</body>\n</html>\n")
    return "".join(parts)


def _block(block: Block) -> str:
    """Write one block. Lists without an entry are left out, with their titles."""
    if isinstance(block, Figures):
        return _figures(block)
    if isinstance(block, Facts):
        return _section(block.title, _facts(block))
    if isinstance(block, Plots):
        return _section(block.title, f'<div class="plots">{"".join(map(curves.svg, block.plots))}</div>', block.note)
    if isinstance(block, Bars):
        return _section(block.title, _chart(block), block.note)

    if isinstance(block, Passages):
        if not block.passages:
            return ""
        return _passages(block)

    if isinstance(block, Replies):
        if not block.replies:
            return ""
        return _section(block.title, "".join(map(_reply, block.replies)), block.note)

    if isinstance(block, Notes):
        if not block.notes:
            return ""
        return _section(block.title, f'<ul class="notes">{"".join(map(_note, block.notes))}</ul>')

    if not block.rows:
        return ""
    return _section(block.title, _table(block), block.note)


def _section(title: str, body: str, note: str = "") -> str:
    if note:
        body += f'<p class="foot">{_text(note)}</p>'
    return f"<section><h2>{_text(title)}</h2>{body}</section>\n"


def _figures(block: Figures) -> str:
    tiles = (f"<div><strong>{_text(number)}</strong><span>{_text(name)}</span></div>" for number, name in block.items)
    if block.chain:
        return f'<div class="figures">{"<i>→</i>".join(tiles)}</div>\n'
    return f'<div class="figures apart">{"".join(tiles)}</div>\n'


def _facts(block: Facts) -> str:
    shown = _pairs(block.rows)
    if block.more:
        shown += f'<details class="more"><summary>{_text(block.more_title)}</summary>{_pairs(block.more)}</details>'
    return shown


def _pairs(rows: Sequence[tuple[str, str]]) -> str:
    return f"<dl>{''.join(f'<dt>{_text(name)}</dt><dd>{_text(value)}</dd>' for name, value in rows)}</dl>"


def _reply(reply: Reply) -> str:
    """Write the latest text, with the earlier ones collapsed below it."""
    (when, text), *earlier = reply.texts
    shown = _pairs([("prompt", reply.prompt), ("in the data", reply.expected), (when, text)])
    if earlier:
        shown += f'<details class="more"><summary>{len(earlier)} earlier</summary>{_pairs(earlier)}</details>'
    return f'<article class="reply">{shown}</article>'


def _note(note: Note) -> str:
    first, *rest = note.text.splitlines()
    body = _text(first)
    if rest:
        body += f"<pre>{_text(chr(10).join(rest))}</pre>"

    examples = "".join(f"<li>{_text(example)}</li>" for example in note.examples)
    if examples:
        body += f"<ul>{examples}</ul>"
    return f'<li class="{note.level}"><b class="sign">{SIGNS[note.level]}</b><div>{body}</div></li>'


def _table(table: Table) -> str:
    classes = ["words" if index in table.words else "number" for index in range(len(table.header))]
    head = "".join(f'<th class="{name}">{_text(cell)}</th>' for name, cell in zip(classes, table.header, strict=True))

    rows = []
    for index, row in enumerate(table.rows):
        cells = "".join(f'<td class="{name}">{_cell(cell)}</td>' for name, cell in zip(classes, row, strict=True))
        start = '<tr class="total">' if index in table.totals else "<tr>"
        rows.append(f"{start}{cells}</tr>")

    body = f"<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody>"
    return f'<div class="wide"><table>{body}</table></div>'


def _cell(text: str) -> str:
    """Let keys and paths break after a dot, an underscore or a slash, before they are broken anywhere."""
    return re.sub(r"(?<=[._/])(?=[^\W\d])", "<wbr>", _text(text))


def _chart(block: Bars) -> str:
    """Draw a histogram, each bar between its count and its label."""
    most = max((count for _, count in block.bars), default=0) or 1
    step = CHART_WIDTH / max(len(block.bars), 1)
    base = COUNT_HEIGHT + CHART_HEIGHT

    shapes = []
    for index, (label, count) in enumerate(block.bars):
        height = 0.0
        shown = ""
        if count:
            height = max(CHART_HEIGHT * count / most, 1.5)  # a small count stays visible beside a large one
            shown = f"{count:,}"

        left = index * step
        middle = (index + 0.5) * step
        shapes.append(
            f"<g><title>{_text(label)}: {count:,}</title>"
            f'<rect x="{left + step * 0.08:.1f}" y="{base - height:.1f}" width="{step * 0.84:.1f}" '
            f'height="{height:.1f}" rx="3"/>'
            f'<text x="{middle:.1f}" y="{base - height - 5:.1f}" class="count">{shown}</text>'
            f'<text x="{middle:.1f}" y="{base + 17}">{_text(label)}</text></g>'
        )

    size = f"0 0 {CHART_WIDTH} {base + LABEL_HEIGHT}"
    line = f'<line x1="0" x2="{CHART_WIDTH}" y1="{base}" y2="{base}"/>'
    return f'<svg viewBox="{size}" role="img" aria-label="{_text(block.title)}">{"".join(shapes)}{line}</svg>'


def _passages(block: Passages) -> str:
    words = "token boundaries; ids under the pointer"
    switch = f'<label class="switch"><input type="checkbox" class="tokens"> {words}</label>'
    legend = f'<p class="legend"><mark>what is trained</mark> <span>what the model only reads</span>{switch}</p>'
    return _section(block.title, legend + "".join(_passage(passage) for passage in block.passages))


def _passage(passage: Passage) -> str:
    pieces = []
    for is_target, tokens in groupby(passage.tokens, key=lambda token: token.is_target):
        inside = "".join(_tokens(list(tokens), is_target))
        if is_target:
            inside = f"<mark>{inside}</mark>"
        pieces.append(inside)

    shown = f"<h3>{_cell(passage.title)}</h3><p>{_text(passage.note)}</p>"
    if passage.tokens:
        shown += f'<div class="sample">{"".join(pieces)}</div>'
    return f"<article>{shown}</article>"


def _tokens(tokens: Sequence[Token], is_target: bool) -> Iterator[str]:
    """Write a stretch of tokens, of which all or none are targets. A long one without targets is collapsed."""
    total = sum(len(token.text) for token in tokens)
    if is_target or total <= FOLDED_CHARACTERS:
        yield from map(_token, tokens)
        return

    ends = [0]
    for token in tokens:
        ends.append(ends[-1] + len(token.text))

    # The tokens that are entirely within the first and the last KEPT_CHARACTERS.
    head = len([end for end in ends[1:] if end <= KEPT_CHARACTERS])
    tail = len([start for start, _ in pairwise(ends) if start >= total - KEPT_CHARACTERS])
    middle = tokens[head : len(tokens) - tail]
    yield from map(_token, tokens[:head])
    yield f"<details><summary>{len(middle):,} more tokens</summary>{''.join(map(_token, middle))}</details>"
    yield from map(_token, tokens[len(tokens) - tail :])


def _token(token: Token) -> str:
    """Write one token, with its id under the pointer."""
    text = escape(token.text)
    # The model learns line ends in a target like any other token, so they are shown.
    if token.is_target:
        text = text.replace("\n", '<span class="end">↵</span>\n')

    kind = "t control" if token.is_control else "t"
    ids = ", ".join(map(str, token.ids))
    return f'<span class="{kind}" title="{ids}">{text}</span>'


def _text(text: str) -> str:
    return escape(redact(text))

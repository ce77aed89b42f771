"""One report in a terminal and as a page: nothing of the data gets out of its place."""

import io
import re
from html.parser import HTMLParser

from rich.console import Console

from apollo_sft.report.document import (
    Bars,
    Document,
    Facts,
    Figures,
    Note,
    Notes,
    Passage,
    Passages,
    Table,
    Token,
)
from apollo_sft.report.page import FOLDED_CHARACTERS, html
from apollo_sft.report.screen import SHORT_CONTEXT, show

EVIL = "<script>alert(1)</script>\"'&<img src=x onerror=alert(2)>"
VOID = {"meta", "input", "rect", "line", "wbr"}


def tokens(*pieces: str, target: bool = False) -> list[Token]:
    return [Token(text, (number,), target, text.startswith("<|")) for number, text in enumerate(pieces)]


def report(*context: str, whole: bool = False) -> Document:
    passage = Passage(EVIL, EVIL, [*tokens(*context), *tokens("yes", "\n", "<|end|>", target=True)], whole)
    return Document(
        EVIL,
        EVIL,
        [
            Figures([("1,234", EVIL)]),
            Notes(EVIL, [Note("bad", f"{EVIL}\n{EVIL}", [EVIL]), Note("warning", "warning"), Note("good", "good")]),
            Table(EVIL, [EVIL, "number"], [[EVIL, "1"], ["sum", "1"]], totals=frozenset({1}), note=EVIL),
            Facts(EVIL, [(EVIL, EVIL)]),
            Bars(EVIL, [(EVIL, 3), ("none", 0), ("most", 24)], EVIL),
            Passages(EVIL, [passage]),
        ],
    )


class Outline(HTMLParser):
    """Fails where tags do not close in turn; keeps tags, attributes, and the text inside <mark>."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.marked = ""
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in VOID and attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "mark" in self.open and "article" in self.open:
            self.marked += data


def test_the_page_is_whole_and_runs_and_loads_nothing() -> None:
    page = html(report(EVIL, " and ", EVIL))
    outline = Outline(page)
    assert not {"script", "img", "link", "iframe", "base"} & outline.tags
    assert not {name for name in outline.attributes if name.startswith("on") or name in ("src", "href")}
    assert "http:" not in page and "https:" not in page and "url(" not in page and "@import" not in page
    assert "default-src 'none'" in page
    assert "prefers-color-scheme: dark" in page


def test_exactly_the_targets_are_marked() -> None:
    outline = Outline(html(report("a ", "b ")))
    assert outline.marked == "yes↵\n<|end|>"


def test_a_long_context_is_folded_up_and_still_there() -> None:
    pieces = [f"{number:04} " for number in range(FOLDED_CHARACTERS)]
    page = html(report(*pieces))
    assert all(piece in page for piece in pieces)
    (number,) = re.findall(r"<summary>([\d,]+) more tokens</summary>", page)
    assert 0 < int(number.replace(",", "")) < len(pieces)
    assert "<details>" not in html(report("short"))


def shown(document: Document, ids: bool = False, **options: object) -> str:
    stream = io.StringIO()
    show(document, Console(file=stream, width=100, highlight=False, **options), ids)  # type: ignore[arg-type]
    return stream.getvalue()


def test_without_colour_brackets_mark_the_targets() -> None:
    text = shown(report("a ", "b "))
    assert "a b ⟦yes\n<|end|>⟧" in text
    assert "\x1b" not in text
    assert "1,234" in text and "✗" in text and "✓" in text and EVIL in text


def test_colour_adds_to_the_brackets() -> None:
    text = shown(report("a ", "b "), force_terminal=True, color_system="standard")
    assert "\x1b[1;32m⟦" in text
    assert re.sub(r"\x1b\[[\d;]*m", "", text).count("⟦yes\n<|end|>⟧") == 1


def test_token_ids_stand_behind_their_tokens() -> None:
    assert "a ‹0›b ‹1›⟦yes‹0›\n‹1›<|end|>‹2›⟧" in shown(report("a ", "b "), ids=True)


def test_a_long_context_is_shortened_unless_the_row_was_asked_for() -> None:
    pieces = [f"{number:04} " for number in range(SHORT_CONTEXT)]
    assert "0000 " in shown(report(*pieces)) and "0200 " not in shown(report(*pieces))
    assert "tokens …" in shown(report(*pieces))
    assert "".join(pieces) in shown(report(*pieces, whole=True)).replace("\n", "")

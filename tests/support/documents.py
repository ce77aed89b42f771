"""Parts of the documents that tests write: between `<!-- name -->` and `<!-- /name -->`."""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

DOCS = Path(__file__).resolve().parents[2] / "docs"
WRITE = os.environ.get("APOLLO_WRITE_DOCS") == "1"


def table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [f"| {' | '.join(map(str, cells))} |\n" for cells in (columns, *rows)]
    return "".join([lines[0], "|---" * len(columns), "|\n", *lines[1:]])


def section(document: str, name: str, text: str) -> str:
    """What stands under `name` in this document; `text`, written there, when APOLLO_WRITE_DOCS is 1."""
    path = DOCS / document
    before, found = path.read_text(encoding="utf-8").split(f"<!-- {name} -->\n")
    inside, after = found.split(f"<!-- /{name} -->\n")
    if not WRITE:
        return inside
    path.write_text(f"{before}<!-- {name} -->\n{text}<!-- /{name} -->\n{after}", encoding="utf-8")
    return text

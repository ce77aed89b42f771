"""Writes the tables of docs/reliability.md from what tests have recorded.

    python -m tests.reliability LINES.jsonl …

`make reliability` runs the tests and then this. What a table of the page holds of tests that are not in LINES stays.
"""

import json
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "reliability.md"
BEGIN, END = "<!-- tables: written by python -m tests.reliability -->", "<!-- end of the tables -->"
HEAD = "| what was tried | trials | failures | worst time |\n| --- | ---: | ---: | ---: |"
ROW = re.compile(r"^\| (?P<name>.+) \| (?P<trials>[\d,]+) \| (?P<failures>[\d,]+) \| (?P<worst>[\d.,]+ s|) \|$")


@dataclass
class Row:
    trials: int = 0
    failures: int = 0
    worst_seconds: float | None = None

    def add(self, line: dict[str, Any]) -> None:
        self.trials += int(line["trials"])
        self.failures += int(line["failures"])
        if line["worst_seconds"] is not None:
            self.worst_seconds = max(self.worst_seconds or 0.0, float(str(line["worst_seconds"])))

    def text(self, name: str) -> str:
        worst = "" if self.worst_seconds is None else f"{self.worst_seconds:,.1f} s"
        return f"| {name} | {self.trials:,} | {self.failures:,} | {worst} |"


Tables = dict[str, dict[str, Row]]
"""By the file of the tests, by what was tried."""


def from_lines(lines: Iterable[str]) -> Tables:
    tables: Tables = {}
    for line in map(json.loads, lines):
        file = str(line["where"]).partition("::")[0]
        tables.setdefault(file, {}).setdefault(line["test"], Row()).add(line)
    return tables


def from_page(page: str) -> Tables:
    tables: Tables = {}
    file = ""
    for line in page.partition(BEGIN)[2].partition(END)[0].splitlines():
        if found := re.fullmatch(r"`pytest (\S+)`:", line):
            file = found[1]
        elif found := ROW.match(line):
            worst = float(found["worst"].removesuffix(" s").replace(",", "")) if found["worst"] else None
            counts = [int(found[name].replace(",", "")) for name in ("trials", "failures")]
            tables.setdefault(file, {})[found["name"]] = Row(*counts, worst)
    return tables


def written(page: str, new: Tables) -> str:
    """The page with the new rows in place of the old ones of the same name."""
    tables = from_page(page)
    for file, rows in new.items():
        tables[file] = tables.get(file, {}) | rows
    parts = []
    for file, rows in sorted(tables.items()):
        parts += [f"`pytest {file}`:\n", HEAD, *(rows[name].text(name) for name in sorted(rows)), ""]
    before, _, rest = page.partition(BEGIN)
    return "\n".join([before + BEGIN + "\n", *parts, END]) + rest.partition(END)[2]


def main(paths: list[str]) -> None:
    lines = [line for path in paths for line in Path(path).read_text(encoding="utf-8").splitlines()]
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8"), from_lines(lines)), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])

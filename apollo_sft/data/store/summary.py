"""Count the rows of a data set: how many are trained, and why others are not."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from apollo_sft.data.tally import Tally


@dataclass(slots=True)
class BadRows:
    """Rows that cannot be used for one reason."""

    tally: Tally = field(default_factory=Tally)

    text: str = ""
    """The whole message about the first of them."""


@dataclass(slots=True)
class StoreSummary:
    """The counts of a data set. `num_rows` = rows that gave samples + rows in `not_trained`.

    Every token of every rendering is in one of `num_tokens`, `tokens_cut` and `tokens_not_trained`; every target is in
    `num_targets` or `targets_lost`.
    """

    files: list[str]

    num_rows: int = 0

    num_samples: int = 0
    """Samples that are trained."""

    num_tokens: int = 0
    """Tokens of trained samples, after truncation."""

    num_targets: int = 0

    num_turns: int = 0

    longest_tokens: int = 0
    """Tokens of the longest rendering, before truncation."""

    longest_row: str | None = None

    over_max_length: Tally = field(default_factory=Tally)
    """Rows that are longer than data.max_length."""

    samples_truncated: int = 0

    tokens_cut: int = 0
    """Tokens that were cut off trained samples."""

    targets_lost: int = 0
    """Targets that were cut off, and those of samples that are not trained."""

    not_trained: Tally = field(default_factory=Tally)
    """Rows without a trained sample, bad rows among them."""

    samples_not_trained: int = 0

    tokens_not_trained: int = 0

    findings: dict[str, Tally] = field(default_factory=dict)
    """What the renderer counted, by the names of `audit.FINDINGS`."""

    max_token_id: int = -1

    stop_tokens: dict[int, int] = field(default_factory=dict)
    """Token id -> turns that end with it, most frequent first."""

    bad: dict[str, BadRows] = field(default_factory=dict)
    """Rows that cannot be used, by the reason."""

    @property
    def rows_bad(self) -> int:
        """Return the number of rows that cannot be used."""
        return sum(rows.tally.count for rows in self.bad.values())

    @property
    def first_bad_text(self) -> str | None:
        """Return the message about the first row that cannot be used, None where there is none."""
        for rows in self.bad.values():
            return rows.text
        return None

    def add(self, later: StoreSummary) -> None:
        """Add the counts of the rows that follow. The rows that are named are still the first ones."""
        # Of rows that are equally long the first one stays.
        if later.longest_tokens > self.longest_tokens:
            self.longest_tokens = later.longest_tokens
            self.longest_row = later.longest_row
        self.max_token_id = max(self.max_token_id, later.max_token_id)
        for name in SUMMED:
            setattr(self, name, getattr(self, name) + getattr(later, name))

        self.over_max_length.merge(later.over_max_length)
        self.not_trained.merge(later.not_trained)
        for token, count in later.stop_tokens.items():
            self.stop_tokens[token] = self.stop_tokens.get(token, 0) + count
        for name, tally in later.findings.items():
            self.findings.setdefault(name, Tally()).merge(tally)
        for reason, rows in later.bad.items():
            self.bad.setdefault(reason, BadRows(text=rows.text)).tally.merge(rows.tally)

    def to_json(self) -> dict[str, Any]:
        """Return the summary as `meta.json` and `data_audit.json` hold it."""
        return {
            "files": self.files,
            "num_rows": self.num_rows,
            "num_samples": self.num_samples,
            "num_tokens": self.num_tokens,
            "num_targets": self.num_targets,
            "num_turns": self.num_turns,
            "longest_tokens": self.longest_tokens,
            "longest_row": self.longest_row,
            "rows_over_max_length": self.over_max_length.count,
            "first_over_max_length": next(iter(self.over_max_length.examples), None),
            "samples_truncated": self.samples_truncated,
            "tokens_cut": self.tokens_cut,
            "targets_lost": self.targets_lost,
            "rows_not_trained": self.not_trained.count,
            "first_not_trained": self.not_trained.examples,
            "samples_not_trained": self.samples_not_trained,
            "tokens_not_trained": self.tokens_not_trained,
            "found": {name: tally.count for name, tally in self.findings.items()},
            "first": {name: tally.examples for name, tally in self.findings.items()},
            "max_token_id": self.max_token_id,
            "stop_tokens": self.stop_tokens,
            "rows_bad": self.rows_bad,
            "bad": {reason: rows.tally.count for reason, rows in self.bad.items()},
            "first_bad": {reason: rows.tally.examples for reason, rows in self.bad.items()},
            "bad_texts": {reason: rows.text for reason, rows in self.bad.items()},
        }

    @classmethod
    def from_json(cls, figures: dict[str, Any]) -> StoreSummary:
        """Return the summary that `to_json` wrote. Raises: KeyError where one of its figures is missing."""
        summary = cls(files=figures["files"])
        for name in (*SUMMED, "longest_tokens", "longest_row", "max_token_id"):
            setattr(summary, name, figures[name])

        first_over = figures["first_over_max_length"]
        summary.over_max_length.count = figures["rows_over_max_length"]
        summary.over_max_length.examples = [] if first_over is None else [first_over]
        summary.not_trained = Tally(figures["rows_not_trained"], figures["first_not_trained"])
        # JSON has texts as keys only.
        summary.stop_tokens = {int(token): count for token, count in figures["stop_tokens"].items()}

        for name, count in figures["found"].items():
            summary.findings[name] = Tally(count, figures["first"][name])
        for reason, count in figures["bad"].items():
            tally = Tally(count, figures["first_bad"][reason])
            summary.bad[reason] = BadRows(tally, figures["bad_texts"][reason])
        return summary


SUMMED = (
    "num_rows",
    "num_samples",
    "num_tokens",
    "num_targets",
    "num_turns",
    "samples_truncated",
    "tokens_cut",
    "targets_lost",
    "samples_not_trained",
    "tokens_not_trained",
)
"""The fields of a summary that are added up."""

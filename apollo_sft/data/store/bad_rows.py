"""Group the rows that cannot be used by reason, and word the one message about all of them."""

from __future__ import annotations

import re

from apollo_sft.data.store.summary import BadRows, StoreSummary
from apollo_sft.errors import DataError

NAMED_REASONS = 5
MOST_REASONS = 50
"""Rows of reasons beyond these are counted together."""

OTHER = "other reasons"
NUMBERS = re.compile(r"(?<![A-Za-z]-)\b\d[\d,]*")


def reason_and_found(message: str, place: str) -> tuple[str, str]:
    """Return the first line of a message about the row `place`, without that place, and what was found there."""
    lines = [" ".join(line.split()) for line in message.splitlines()] or [""]
    return lines[0].removeprefix(place).lstrip(":, "), _labelled("found:", message)


def _labelled(label: str, message: str) -> str:
    """Return the text of the line of a message that begins with a label, "" where there is none."""
    for line in message.splitlines()[1:]:
        words = " ".join(line.split())
        if words.startswith(label):
            return words.removeprefix(label).strip()
    return ""


def count_bad(summary: StoreSummary, place: str, error: DataError) -> None:
    """Count a row that cannot be used. Reasons that differ in numbers only are one: the rows may differ in length."""
    reason = NUMBERS.sub("…", reason_and_found(str(error), place)[0])
    summary.bad.setdefault(reason, BadRows(text=str(error))).tally.add(place)


def without_rare(summary: StoreSummary) -> None:
    """Keep the first `MOST_REASONS`, and `OTHER`: a file of a million different mistakes must not fill memory."""
    reasons = [reason for reason in summary.bad if reason != OTHER]
    for reason in reasons[MOST_REASONS:]:
        rare = summary.bad.pop(reason)
        summary.bad.setdefault(OTHER, BadRows(text=rare.text)).tally.merge(rare.tally)


def refuse_bad(summary: StoreSummary, files_key: str) -> None:
    """Refuse any row that cannot be used, as data.bad_rows=error asks for. Raises: DataError about all of them."""
    if not summary.rows_bad:
        return
    if summary.rows_bad == 1:
        [rows] = summary.bad.values()
        raise DataError(rows.text)
    raise DataError(
        f"{files_key}: {summary.rows_bad:,} of {summary.num_rows:,} rows cannot be used",
        found=reasons_in_words(summary),
        expected="rows that can all be trained on",
        fix="correct the rows, or data.bad_rows=skip, which leaves them out",
    )


def refuse_too_many_bad(summary: StoreSummary, files_key: str, most: float) -> None:
    """Refuse more rows that cannot be used than data.bad_rows=skip may leave out. `most`: data.max_bad_ratio.

    Raises: DataError above it.
    """
    ratio = summary.rows_bad / max(summary.num_rows, 1)
    if ratio <= most:
        return
    raise DataError(
        f"{files_key}: {summary.rows_bad:,} of {summary.num_rows:,} rows cannot be used ({ratio:.2%}), too many",
        found=reasons_in_words(summary),
        expected=f"at most {most:.10g} of all rows (data.max_bad_ratio)",
        fix="correct the rows; to leave them all out, a larger data.max_bad_ratio",
    )


def reasons_in_words(summary: StoreSummary) -> str:
    """Return the most common reasons, each with its first rows, and what was found in the first of them."""
    common = sorted(summary.bad, key=lambda reason: -summary.bad[reason].tally.count)
    lines = []
    for reason in common[:NAMED_REASONS]:
        rows = summary.bad[reason]
        line = f"{rows.tally.count:,} x {reason}"
        found = reason_and_found(rows.text, rows.tally.examples[0])[1]
        if found:
            line += f" ({found})"
        lines.append(line)
        lines.append(f"  first {', '.join(rows.tally.examples)}")
        fix = _labelled("to do:", rows.text)
        if fix:
            lines.append(f"  to do: {fix}")

    others = common[NAMED_REASONS:]
    if others:
        rest = sum(summary.bad[reason].tally.count for reason in others)
        lines.append(f"{rest:,} x {len(others)} more reasons")

    # Aligned with what follows the word `found:` of the message.
    return ("\n" + 12 * " ").join(lines)

"""Rows that cannot be used: grouped by reason, and the one message about all of them."""

from __future__ import annotations

import re

from apollo_sft.data.store.store_files import StoreSummary
from apollo_sft.errors import DataError

NAMED_REASONS = 5
MOST_REASONS = 50
"""Rows of reasons beyond these are counted together."""
OTHER = "other reasons"
NUMBERS = re.compile(r"(?<![A-Za-z]-)\b\d[\d,]*")


def reason_and_found(message: str, place: str) -> tuple[str, str]:
    """Of a message about the row `place`: its first line without that place, and what was found there."""
    first, *rest = [" ".join(line.split()) for line in message.splitlines()] or [""]
    found = next((line.removeprefix("found:").strip() for line in rest if line.startswith("found:")), "")
    return first.removeprefix(place).lstrip(":, "), found


def count_bad(summary: StoreSummary, place: str, error: DataError) -> None:
    """Numbers make no reason of their own: rows of different lengths may fail for one."""
    reason = NUMBERS.sub("…", reason_and_found(str(error), place)[0])
    summary.rows_bad += 1
    summary.bad[reason] = summary.bad.get(reason, 0) + 1
    summary.first_bad.setdefault(reason, []).append(place)
    summary.bad_texts.setdefault(reason, str(error))


def without_rare(summary: StoreSummary) -> None:
    """Keep the first `MOST_REASONS`, and `OTHER`: a file of a million different mistakes must not fill memory."""
    for reason in [reason for reason in summary.bad if reason != OTHER][MOST_REASONS:]:
        summary.bad[OTHER] = summary.bad.get(OTHER, 0) + summary.bad.pop(reason)
        summary.first_bad.setdefault(OTHER, []).extend(summary.first_bad.pop(reason))
        summary.bad_texts.setdefault(OTHER, summary.bad_texts.pop(reason))
    for rows in summary.first_bad.values():
        del rows[NAMED_REASONS:]


def refuse_bad(summary: StoreSummary, files_key: str) -> None:
    """With data.bad_rows=error. Raises: DataError about all rows that cannot be used."""
    if not summary.rows_bad:
        return
    if summary.rows_bad == 1:
        [text] = summary.bad_texts.values()
        raise DataError(text)
    raise DataError(
        f"{files_key}: {summary.rows_bad:,} of {summary.num_rows:,} rows cannot be used",
        found=reasons_in_words(summary),
        expected="rows that can all be trained on",
        fix="mend the rows, or data.bad_rows=skip, which leaves them out",
    )


def refuse_too_many_bad(summary: StoreSummary, files_key: str, most: float) -> None:
    """With data.bad_rows=skip. `most`: data.max_bad_ratio. Raises: DataError above it."""
    ratio = summary.rows_bad / max(summary.num_rows, 1)
    if ratio <= most:
        return
    raise DataError(
        f"{files_key}: {summary.rows_bad:,} of {summary.num_rows:,} rows cannot be used ({ratio:.2%}), too many",
        found=reasons_in_words(summary),
        expected=f"at most {most:.10g} of all rows (data.max_bad_ratio)",
        fix="mend the rows; if leaving them out is meant, a larger data.max_bad_ratio",
    )


def reasons_in_words(summary: StoreSummary) -> str:
    """The most common reasons, each with its first rows, and what was found in the first of them."""
    common = sorted(summary.bad, key=lambda reason: -summary.bad[reason])
    lines = []
    for reason in common[:NAMED_REASONS]:
        rows = summary.first_bad[reason]
        found = reason_and_found(summary.bad_texts[reason], rows[0])[1]
        lines.append(f"{summary.bad[reason]:,} x {reason}" + (f" ({found})" if found else ""))
        lines.append(f"  first {', '.join(rows)}")
    if common[NAMED_REASONS:]:
        rest = sum(summary.bad[reason] for reason in common[NAMED_REASONS:])
        lines.append(f"{rest:,} x {len(common) - NAMED_REASONS} more reasons")
    return ("\n" + 12 * " ").join(lines)

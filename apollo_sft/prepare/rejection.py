"""A row that cannot be prepared: it is written to rejected.jsonl with its reason, and the work continues."""

from __future__ import annotations


class RejectedRow(Exception):  # noqa: N818 - it is no error of the program: the row is listed
    """`reason` is a short sentence that many rows share: rejects are counted by it."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason

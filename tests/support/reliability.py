"""What a test of faults has shown, one JSON line each: docs/reliability.md is made of these lines."""

import json
import os
from pathlib import Path

VARIABLE = "APOLLO_RELIABILITY"
"""Names the file that the lines are added to; without it nothing is written."""


def record(name: str, *, trials: int, failures: int, worst_seconds: float | None) -> None:
    """Add one line. `worst_seconds`: the longest of all trials, None when there is nothing to time.

    Call it before the assertions, so that a failure is on record too. Several tests may write at once: a line is one
    write to a file opened for appending.
    """
    path = os.environ.get(VARIABLE)
    if not path:
        return
    worst = None if worst_seconds is None else round(worst_seconds, 2)
    where = os.environ.get("PYTEST_CURRENT_TEST", "").partition(" ")[0]
    line = {"test": name, "where": where, "trials": trials, "failures": int(failures), "worst_seconds": worst}
    with Path(path).open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")

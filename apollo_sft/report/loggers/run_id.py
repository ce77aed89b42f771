"""Functions that the loggers share: the id that a run keeps over all its starts, and the name of its end."""

from __future__ import annotations

import os
import secrets
import sys
from pathlib import Path

from apollo_sft.errors import Preempted
from apollo_sft.report.metrics import Record
from apollo_sft.report.sinks import RunInfo


def metrics_of(record: Record) -> Record:
    """Return the metrics of a record, without its step."""
    return {name: value for name, value in record.items() if name != "step"}


def ended(done: str, stopped: str, failed: str) -> str:
    """Return a logger's name for the end of this run."""
    # Loggers are closed in a `finally`, so that the error that ends the run, if any, is the current one.
    reason = sys.exc_info()[1]
    if reason is None:
        return done
    if isinstance(reason, Preempted):
        return stopped
    return failed


def run_id_of(info: RunInfo, logger: str, variable: str) -> str:
    """Return the id that the environment gives, else that of the folder's earlier starts, else a new one; store it."""
    path = info.folder / logger / "run_id"
    earlier = stored(path)
    run_id = os.environ.get(variable) or earlier or secrets.token_hex(4)
    if run_id != earlier:
        store(path, run_id)
    return run_id


def stored(path: Path) -> str:
    """Return the id in a file; empty without one."""
    if not path.is_file():
        return ""
    return path.read_text(encoding="utf-8").strip()


def store(path: Path, run_id: str) -> None:
    """Write the id for the next start of the run."""
    path.parent.mkdir(exist_ok=True)
    path.write_text(run_id + "\n", encoding="utf-8")

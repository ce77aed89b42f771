"""The launcher's last word on a run: run.json agrees with the exit code, even when rank 0 was killed."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path

from apollo_sft.checkpoint.publish import write_durably
from apollo_sft.checkpoint.run_folder.folder import RUN_JSON, TIME, now, read_run, status_of


def settle_run(folder: Path, code: int, since: float) -> int:
    """Make run.json agree with the exit code of a run that began after `since` (seconds since 1970) and has ended.

    Rank 0 may have been killed before it could write it. Return the exit code: 0 when run.json says that the run was
    finished, unless its model has still to be uploaded.
    """
    run = read_run(folder)
    if run is None or datetime.strptime(run["started"], TIME).timestamp() < int(since):
        return code

    if run["status"] == "finished":
        return code if run.get("uploaded") is False else 0

    status = status_of(code)
    if run["status"] != status:
        changed = run | {"status": status, "finished": run["finished"] or now()}
        write_durably(folder / RUN_JSON, json.dumps(changed, indent=2, ensure_ascii=False) + "\n")

    return code

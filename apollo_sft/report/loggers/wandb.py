"""Weights & Biases, online or offline in `wandb/` of the run folder."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from apollo_sft.errors import Preempted
from apollo_sft.redact import redact
from apollo_sft.report.log import say
from apollo_sft.report.loggers.run_id import metrics_of, run_id_of
from apollo_sft.report.metrics import Record
from apollo_sft.report.sinks import REPLY_COLUMNS, RunInfo


class Wandb:
    """Log to wandb. A run folder is one run there, however often it is restarted: its id is in `wandb/run_id`."""

    def __init__(self, info: RunInfo) -> None:
        import wandb

        self._run = wandb.init(
            project=redact(info.project),
            name=redact(info.experiment),
            dir=str(info.folder),
            config=info.config,
            id=run_id_of(info, "wandb", "WANDB_RUN_ID"),
            resume="allow",
            # Its own description of the process would hold the command line as it was given, secrets included.
            settings=wandb.Settings(console="off", silent=True, x_disable_meta=True),
        )

        if self._run.offline:
            say(f"wandb: offline, in {Path(self._run.dir).parent}")
        else:
            say(f"wandb: {self._run.url}")

    def log(self, record: Record) -> None:
        self._run.log(metrics_of(record), step=int(record["step"]))

    def replies(self, step: int, replies: Sequence[Mapping[str, Any]]) -> None:
        import wandb

        rows = [[str(reply[name]) for name in REPLY_COLUMNS] for reply in replies]
        self._run.log({"val/replies": wandb.Table(columns=list(REPLY_COLUMNS), data=rows)}, step=step)

    def close(self) -> None:
        import wandb

        # Loggers are closed in a `finally`: wandb shows the run as failed, or as preempted, by the error that ends it.
        reason = sys.exc_info()[1]
        if isinstance(reason, Preempted):
            self._run.mark_preempting()

        # Offline, `finish` returns before the file is complete: `teardown` waits for it.
        self._run.finish(exit_code=int(reason is not None))
        wandb.teardown()

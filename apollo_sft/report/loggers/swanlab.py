"""swanlab: its server, or `swanlab/` of the run folder."""

from __future__ import annotations

import io
import os
import sys
from contextlib import redirect_stdout

from apollo_sft.redact import redact
from apollo_sft.report.log import say
from apollo_sft.report.loggers.run_id import ended, metrics_of, run_id_of
from apollo_sft.report.metrics import Record
from apollo_sft.report.sinks import RunInfo

SWANLAB_PROBES = ("hardware", "runtime", "requirements", "git", "swanlab", "monitor")


class SwanLab:
    """Log to swanlab's server with SWANLAB_API_KEY or SWANLAB_MODE=online, else to `swanlab/` in the run folder.

    A run folder has one id, in `swanlab/run_id`.
    """

    def __init__(self, info: RunInfo) -> None:
        import swanlab

        mode = "online" if os.environ.get("SWANLAB_API_KEY") else "offline"
        mode = os.environ.get("SWANLAB_MODE") or mode

        # swanlab prints to stdout, which is for results.
        with redirect_stdout(io.StringIO()):
            self._run = swanlab.init(
                project=redact(info.project),
                name=redact(info.experiment),
                config=info.config,
                mode=mode,
                log_dir=str(info.folder / "swanlab"),
                id=run_id_of(info, "swanlab", "SWANLAB_RUN_ID"),
                resume="allow",
                # Its own description of the process would hold the command line as it was given, secrets included.
                settings=swanlab.Settings(
                    interactive=False, terminal={"proxy_type": "none"}, probe=dict.fromkeys(SWANLAB_PROBES, False)
                ),
            )

        if mode == "online":
            say(f"swanlab: {self._run.url}")
        else:
            say(f"swanlab: {mode}, in {info.folder / 'swanlab'}")

    def log(self, record: Record) -> None:
        self._run.log(metrics_of(record), step=int(record["step"]))

    def close(self) -> None:
        reason = sys.exc_info()[1]
        with redirect_stdout(io.StringIO()):
            self._run.finish(ended("success", "aborted", "crashed"), error=reason and redact(str(reason)))

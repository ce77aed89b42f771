"""trackio: its server, or a folder of its own."""

from __future__ import annotations

import io
from contextlib import redirect_stdout

from apollo_sft.redact import redact
from apollo_sft.report.log import say
from apollo_sft.report.loggers.run_id import metrics_of, run_id_of
from apollo_sft.report.metrics import Record
from apollo_sft.report.sinks import RunInfo


class Trackio:
    """Log to the server of TRACKIO_SERVER_URL or TRACKIO_SPACE_ID, else to TRACKIO_DIR, which has a default of its own.

    trackio identifies runs by their names only: the name ends with the id in `trackio/run_id` of the run folder.
    """

    def __init__(self, info: RunInfo) -> None:
        # trackio prints to stdout, which is for results.
        with redirect_stdout(io.StringIO()):
            import trackio

            self._run = trackio.init(
                project=redact(info.project),
                name=f"{redact(info.experiment)}-{run_id_of(info, 'trackio', 'TRACKIO_RUN_ID')}",
                config=info.config,
                resume="allow",
                embed=False,
                auto_log_gpu=False,
                auto_log_cpu=False,
            )

        say(f"trackio: {self._run.name}, in {self._run.url or trackio.TRACKIO_DIR}")

    def log(self, record: Record) -> None:
        self._run.log(metrics_of(record), step=int(record["step"]))

    def close(self) -> None:
        import trackio

        with redirect_stdout(io.StringIO()):
            trackio.finish()

"""mlflow: a tracking server, or a database in `mlflow/` of the run folder."""

from __future__ import annotations

import os
import time
from typing import Any

from apollo_sft.config.overrides import leaves
from apollo_sft.redact import redact
from apollo_sft.report.log import say
from apollo_sft.report.loggers.run_id import ended, metrics_of, store, stored
from apollo_sft.report.metrics import Record
from apollo_sft.report.sinks import RunInfo

MLFLOW_DEFAULTS = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
}
"""No telemetry, and a server that is down delays a step by seconds, not by minutes."""
MLFLOW_LONGEST = 6000
"""The number of characters of a parameter that every mlflow server accepts."""
MLFLOW_BATCH = 100
"""The number of parameters that a server accepts in one request."""


class Mlflow:
    """Log to the server of MLFLOW_TRACKING_URI, else to `mlflow/mlflow.db` in the run folder.

    A run folder is one run of mlflow, however often it is restarted: its id is in `mlflow/run_id`.
    """

    def __init__(self, info: RunInfo) -> None:
        for name, value in MLFLOW_DEFAULTS.items():
            os.environ.setdefault(name, value)

        # mlflow reads those variables when it is imported.
        from mlflow import MlflowClient, entities

        path = info.folder / "mlflow"
        path.mkdir(exist_ok=True)
        uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{path / 'mlflow.db'}"
        self._client = MlflowClient(uri)
        self._metric = entities.Metric

        self._id = os.environ.get("MLFLOW_RUN_ID") or stored(path / "run_id") or _new_in_mlflow(self._client, info)
        self._client.update_run(self._id, status="RUNNING")
        store(path / "run_id", self._id)
        say(f"mlflow: run {self._id}, in {uri}")

    def log(self, record: Record) -> None:
        now = int(time.time() * 1000)
        step = int(record["step"])
        self._client.log_batch(self._id, [self._metric(*pair, now, step) for pair in metrics_of(record).items()])

    def close(self) -> None:
        self._client.set_terminated(self._id, ended("FINISHED", "KILLED", "FAILED"))


def _new_in_mlflow(client: Any, info: RunInfo) -> str:
    """Create a run with the configuration as its parameters. Return its id."""
    from mlflow.entities import Param

    found = client.get_experiment_by_name(redact(info.project))
    experiment = found.experiment_id if found else client.create_experiment(redact(info.project))

    run_id: str = client.create_run(experiment, run_name=redact(info.experiment)).info.run_id
    params = [Param(key, str(value)[:MLFLOW_LONGEST]) for key, value in leaves(info.config)]
    for first in range(0, len(params), MLFLOW_BATCH):
        client.log_batch(run_id, params=params[first : first + MLFLOW_BATCH])

    return run_id

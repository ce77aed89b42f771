"""The loggers of `trainer.logger` that are other people's programs. Each gets the names of `metrics`."""

from __future__ import annotations

import importlib.util
import io
import os
import secrets
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from apollo_sft.config.overrides import leaves
from apollo_sft.errors import ConfigError, Preempted
from apollo_sft.redact import redact
from apollo_sft.report.log import say, warn
from apollo_sft.report.metrics import Record


@dataclass(frozen=True, slots=True)
class RunInfo:
    """What a logger is told of the run. `config` is the resolved configuration, `first_step` the number of steps that
    were done before: later ones, which an earlier process may have logged, come again."""

    folder: Path
    project: str
    experiment: str
    config: dict[str, Any]
    first_step: int = 0


REPLY_COLUMNS = ("row", "prompt", "expected", "text")


class Sink(Protocol):
    def log(self, record: Record) -> None:
        """Take one record; `record["step"]` counts from 1."""

    def close(self) -> None:
        """Write what is still held back."""


@runtime_checkable
class TakesText(Protocol):
    """A logger that shows texts as well."""

    def replies(self, step: int, replies: Sequence[Mapping[str, Any]]) -> None:
        """What the model said at a validation: `row`, `prompt`, `expected`, `text` of each."""


class TensorBoard:
    def __init__(self, info: RunInfo) -> None:
        from torch.utils.tensorboard import SummaryWriter

        again_from = info.first_step + 1 if info.first_step else 0  # step 0 is a validation before the first
        self._writer = SummaryWriter(str(info.folder / "tensorboard"), purge_step=again_from)

    def log(self, record: Record) -> None:
        for name, value in _metrics(record).items():
            self._writer.add_scalar(name, value, int(record["step"]))

    def replies(self, step: int, replies: Sequence[Mapping[str, Any]]) -> None:
        for number, reply in enumerate(replies):
            text = "\n\n".join(f"**{name}**\n\n{_quoted(str(reply[name]))}" for name in REPLY_COLUMNS)
            self._writer.add_text(f"val/reply_{number}", text, step)

    def close(self) -> None:
        self._writer.close()


def _quoted(text: str) -> str:
    """As it is, in markdown."""
    return "\n".join(f"    {line}" for line in text.split("\n"))


class Wandb:
    """A run folder is one run of wandb, however often it was started again: its id lies in `wandb/run_id`."""

    def __init__(self, info: RunInfo) -> None:
        import wandb

        self._run = wandb.init(
            project=redact(info.project),
            name=redact(info.experiment),
            dir=str(info.folder),
            config=info.config,
            id=_run_id(info, "wandb", "WANDB_RUN_ID"),
            resume="allow",
            # Its own description of the process would hold the command line as it was given, secrets included.
            settings=wandb.Settings(console="off", silent=True, x_disable_meta=True),
        )
        say(f"wandb: offline, in {Path(self._run.dir).parent}" if self._run.offline else f"wandb: {self._run.url}")

    def log(self, record: Record) -> None:
        self._run.log(_metrics(record), step=int(record["step"]))

    def replies(self, step: int, replies: Sequence[Mapping[str, Any]]) -> None:
        import wandb

        rows = [[str(reply[name]) for name in REPLY_COLUMNS] for reply in replies]
        self._run.log({"val/replies": wandb.Table(columns=list(REPLY_COLUMNS), data=rows)}, step=step)

    def close(self) -> None:
        import wandb

        reason = sys.exc_info()[1]  # closed on the way out of an error: wandb shows the run as failed, or as preempted
        if isinstance(reason, Preempted):
            self._run.mark_preempting()
        self._run.finish(exit_code=int(reason is not None))
        wandb.teardown()  # offline, `finish` comes back before the file is whole


class Mlflow:
    """To the server of MLFLOW_TRACKING_URI, else to `mlflow/mlflow.db` in the run folder. A run folder is one run of
    mlflow, however often it was started again: its id lies in `mlflow/run_id`."""

    def __init__(self, info: RunInfo) -> None:
        for name, value in MLFLOW_DEFAULTS.items():
            os.environ.setdefault(name, value)
        from mlflow import MlflowClient, entities

        path = info.folder / "mlflow"
        path.mkdir(exist_ok=True)
        uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{path / 'mlflow.db'}"
        self._client, self._metric = MlflowClient(uri), entities.Metric
        self._id = os.environ.get("MLFLOW_RUN_ID") or _stored(path / "run_id") or _new_in_mlflow(self._client, info)
        self._client.update_run(self._id, status="RUNNING")
        _store(path / "run_id", self._id)
        say(f"mlflow: run {self._id}, in {uri}")

    def log(self, record: Record) -> None:
        now, step = int(time.time() * 1000), int(record["step"])
        self._client.log_batch(self._id, [self._metric(*pair, now, step) for pair in _metrics(record).items()])

    def close(self) -> None:
        self._client.set_terminated(self._id, _ended("FINISHED", "KILLED", "FAILED"))


def _new_in_mlflow(client: Any, info: RunInfo) -> str:
    """The id of a new run with the configuration as its parameters."""
    from mlflow.entities import Param

    found = client.get_experiment_by_name(redact(info.project))
    experiment = found.experiment_id if found else client.create_experiment(redact(info.project))
    run_id: str = client.create_run(experiment, run_name=redact(info.experiment)).info.run_id
    params = [Param(key, str(value)[:MLFLOW_LONGEST]) for key, value in leaves(info.config)]
    for first in range(0, len(params), 100):  # the most that a server takes at once
        client.log_batch(run_id, params=params[first : first + 100])
    return run_id


class SwanLab:
    """To swanlab's server when SWANLAB_API_KEY or SWANLAB_MODE=online says so, else to `swanlab/` in the run folder.
    One id for the run folder, in `swanlab/run_id`."""

    def __init__(self, info: RunInfo) -> None:
        import swanlab

        mode = os.environ.get("SWANLAB_MODE") or ("online" if os.environ.get("SWANLAB_API_KEY") else "offline")
        with redirect_stdout(io.StringIO()):
            self._run = swanlab.init(
                project=redact(info.project),
                name=redact(info.experiment),
                config=info.config,
                mode=mode,
                log_dir=str(info.folder / "swanlab"),
                id=_run_id(info, "swanlab", "SWANLAB_RUN_ID"),
                resume="allow",
                # Its own description of the process would hold the command line as it was given, secrets included.
                settings=swanlab.Settings(
                    interactive=False, terminal={"proxy_type": "none"}, probe=dict.fromkeys(SWANLAB_PROBES, False)
                ),
            )
        say(f"swanlab: {self._run.url}" if mode == "online" else f"swanlab: {mode}, in {info.folder / 'swanlab'}")

    def log(self, record: Record) -> None:
        self._run.log(_metrics(record), step=int(record["step"]))

    def close(self) -> None:
        reason = sys.exc_info()[1]
        with redirect_stdout(io.StringIO()):
            self._run.finish(_ended("success", "aborted", "crashed"), error=reason and redact(str(reason)))


class Trackio:
    """To the server of TRACKIO_SERVER_URL or TRACKIO_SPACE_ID, else to TRACKIO_DIR, which has a default of its own.

    It knows runs by their names only: the name ends with the id in `trackio/run_id` of the run folder."""

    def __init__(self, info: RunInfo) -> None:
        with redirect_stdout(io.StringIO()):
            import trackio

            self._run = trackio.init(
                project=redact(info.project),
                name=f"{redact(info.experiment)}-{_run_id(info, 'trackio', 'TRACKIO_RUN_ID')}",
                config=info.config,
                resume="allow",
                embed=False,
                auto_log_gpu=False,
                auto_log_cpu=False,
            )
        say(f"trackio: {self._run.name}, in {self._run.url or trackio.TRACKIO_DIR}")

    def log(self, record: Record) -> None:
        self._run.log(_metrics(record), step=int(record["step"]))

    def close(self) -> None:
        import trackio

        with redirect_stdout(io.StringIO()):
            trackio.finish()


def _metrics(record: Record) -> Record:
    return {name: value for name, value in record.items() if name != "step"}


def _ended(done: str, stopped: str, failed: str) -> str:
    """What a logger calls the end of this run; it is closed on the way out of an error, too."""
    reason = sys.exc_info()[1]
    return done if reason is None else stopped if isinstance(reason, Preempted) else failed


def _run_id(info: RunInfo, logger: str, variable: str) -> str:
    """That of the environment, else the one of the folder's earlier starts, else a new one. Stored for the next."""
    path = info.folder / logger / "run_id"
    stored = _stored(path)
    run_id = os.environ.get(variable) or stored or secrets.token_hex(4)
    if run_id != stored:
        _store(path, run_id)
    return run_id


def _stored(path: Path) -> str:
    return path.read_text(encoding="utf-8").strip() if path.is_file() else ""


def _store(path: Path, run_id: str) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(run_id + "\n", encoding="utf-8")


BACKENDS: dict[str, tuple[str, Callable[[RunInfo], Sink]]] = {
    "tensorboard": ("tensorboard", TensorBoard),
    "wandb": ("wandb", Wandb),
    "mlflow": ("mlflow", Mlflow),
    "swanlab": ("swanlab", SwanLab),
    "trackio": ("trackio", Trackio),
}
"""Name in `trainer.logger` -> (package, sink). `console` and `file` need none."""
SWANLAB_PROBES = ("hardware", "runtime", "requirements", "git", "swanlab", "monitor")
MLFLOW_DEFAULTS = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
}
"""Nothing is sent to its makers, and a server that is gone holds a step up for seconds, not for minutes."""
MLFLOW_LONGEST = 6000
"""Characters of a parameter that every mlflow server takes."""


def check_backends(names: Sequence[str]) -> None:
    """Raises: ConfigError when the package of a wanted logger is not installed, or wandb cannot log in."""
    for name in names:
        if name in BACKENDS and not _is_installed(BACKENDS[name][0]):
            raise ConfigError(
                f"trainer.logger: {name} needs the package {BACKENDS[name][0]}, which is not installed",
                found=list(names),
                fix=f"pip install 'apollo-sft[{name}]', or leave {name} out of trainer.logger",
            )
    if "wandb" in names and not _wandb_may_log_in():
        raise ConfigError(
            "trainer.logger: wandb has no key to log in with",
            found="neither WANDB_API_KEY nor a file that `wandb login` writes",
            fix="wandb login; or WANDB_MODE=offline, and later `wandb sync`; or leave wandb out of trainer.logger",
        )


def _wandb_may_log_in() -> bool:
    """False only when there is no sign of a key at all. wandb itself would say so after the model is loaded."""
    environ = os.environ
    if environ.get("WANDB_MODE", "online") != "online":
        return True
    if any(environ.get(f"WANDB_{name}") for name in ("API_KEY", "IDENTITY_TOKEN_FILE")):
        return True
    home = environ.get("WANDB_CONFIG_DIR") or "~/.config/wandb"
    files = (environ.get("NETRC") or "~/.netrc", "~/_netrc", f"{home}/settings", "wandb/settings")
    return any(Path(file).expanduser().is_file() for file in files)


def _is_installed(package: str) -> bool:
    spec = importlib.util.find_spec(package)
    # A folder of that name, which the logger itself may have left in the working directory, has no origin.
    return spec is not None and spec.origin is not None


class Sinks:
    """All wanted loggers as one. One that fails is reported once and left out; the run goes on."""

    def __init__(self, names: Sequence[str], info: RunInfo) -> None:
        self._open: dict[str, Sink] = {}
        for name in dict.fromkeys(names):
            if name in BACKENDS:
                self._guard(name, partial(self._start, name, info))

    def log(self, record: Record) -> None:
        for name, sink in list(self._open.items()):
            self._guard(name, partial(sink.log, record))

    def replies(self, step: int, replies: Sequence[Mapping[str, Any]]) -> None:
        for name, sink in list(self._open.items()):
            if isinstance(sink, TakesText):
                self._guard(name, partial(sink.replies, step, replies))

    def close(self) -> None:
        for name, sink in list(self._open.items()):
            self._guard(name, sink.close)

    def _start(self, name: str, info: RunInfo) -> None:
        self._open[name] = BACKENDS[name][1](info)

    def _guard(self, name: str, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:  # a foreign program may raise anything; metrics.jsonl holds every number anyway
            warn(f"the logger {name} failed and is left out from here on: {type(error).__name__}: {error}")
            self._open.pop(name, None)

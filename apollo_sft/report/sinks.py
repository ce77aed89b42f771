"""The loggers of `trainer.logger` that are other people's programs. Each gets the names of `metrics`."""

from __future__ import annotations

import importlib.util
import os
import secrets
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from apollo_sft.errors import ConfigError, Preempted, redact
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


class Sink(Protocol):
    def log(self, record: Record) -> None:
        """Take one record; `record["step"]` counts from 1."""

    def close(self) -> None:
        """Write what is still held back."""


class TensorBoard:
    def __init__(self, info: RunInfo) -> None:
        from torch.utils.tensorboard import SummaryWriter

        again_from = info.first_step + 1 if info.first_step else 0  # step 0 is a validation before the first
        self._writer = SummaryWriter(str(info.folder / "tensorboard"), purge_step=again_from)

    def log(self, record: Record) -> None:
        for name, value in record.items():
            if name != "step":
                self._writer.add_scalar(name, value, int(record["step"]))

    def close(self) -> None:
        self._writer.close()


class Wandb:
    """A run folder is one run of wandb, however often it was started again: its id lies in `wandb/run_id`."""

    def __init__(self, info: RunInfo) -> None:
        import wandb

        self._run = wandb.init(
            project=redact(info.project),
            name=redact(info.experiment),
            dir=str(info.folder),
            config=info.config,
            id=_wandb_id(info.folder / "wandb" / "run_id"),
            resume="allow",
            # Its own description of the process would hold the command line as it was given, secrets included.
            settings=wandb.Settings(console="off", silent=True, x_disable_meta=True),
        )
        say(f"wandb: offline, in {Path(self._run.dir).parent}" if self._run.offline else f"wandb: {self._run.url}")

    def log(self, record: Record) -> None:
        metrics = {name: value for name, value in record.items() if name != "step"}
        self._run.log(metrics, step=int(record["step"]))

    def close(self) -> None:
        import wandb

        reason = sys.exc_info()[1]  # closed on the way out of an error: wandb shows the run as failed, or as preempted
        if isinstance(reason, Preempted):
            self._run.mark_preempting()
        self._run.finish(exit_code=int(reason is not None))
        wandb.teardown()  # offline, `finish` comes back before the file is whole


def _wandb_id(path: Path) -> str:
    """That of the environment, else the one of the folder's earlier starts, else a new one. Stored for the next."""
    stored = path.read_text(encoding="utf-8").strip() if path.is_file() else ""
    run_id = os.environ.get("WANDB_RUN_ID") or stored or secrets.token_hex(4)
    if run_id != stored:
        path.parent.mkdir(exist_ok=True)
        path.write_text(run_id + "\n", encoding="utf-8")
    return run_id


BACKENDS: dict[str, tuple[str, Callable[[RunInfo], Sink]]] = {
    "tensorboard": ("tensorboard", TensorBoard),
    "wandb": ("wandb", Wandb),
}
"""Name in `trainer.logger` -> (package, sink). `console` and `file` need none."""


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

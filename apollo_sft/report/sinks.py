"""The loggers of `trainer.logger` that are programs of others. All get the metrics under the same names."""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

from apollo_sft.errors import ConfigError
from apollo_sft.report.log import warn
from apollo_sft.report.metrics import Record


@dataclass(frozen=True, slots=True)
class RunInfo:
    """Facts of the run, for its loggers."""

    folder: Path
    project: str
    experiment: str
    config: dict[str, Any]
    """The resolved configuration."""
    first_step: int = 0
    """The number of steps that were done before. Later ones, which an earlier process may have logged, come again."""


REPLY_COLUMNS = ("row", "prompt", "expected", "text")


class Sink(Protocol):
    """A logger."""

    def log(self, record: Record) -> None:
        """Take one record; `record["step"]` counts from 1."""

    def close(self) -> None:
        """Write what is still buffered."""


@runtime_checkable
class TakesText(Protocol):
    """A logger that shows texts as well."""

    def replies(self, step: int, replies: Sequence[Mapping[str, Any]]) -> None:
        """Take the model's replies at a validation: `row`, `prompt`, `expected`, `text` of each."""


class Backend(NamedTuple):
    """The place of a logger."""

    package: str
    """The package that it needs."""
    module: str
    """Our module for it."""
    name: str
    """The class in that module."""


BACKENDS = {
    name: Backend(name, f"apollo_sft.report.loggers.{name}", class_name)
    for name, class_name in {
        "tensorboard": "TensorBoard",
        "wandb": "Wandb",
        "mlflow": "Mlflow",
        "swanlab": "SwanLab",
        "trackio": "Trackio",
    }.items()
}
"""Name in `trainer.logger` -> its backend. `console` and `file` need none."""


def check_backends(names: Sequence[str]) -> None:
    """Raise a ConfigError when the package of a wanted logger is not installed, or wandb cannot log in."""
    for name in names:
        if name in BACKENDS and not _is_installed(BACKENDS[name].package):
            raise ConfigError(
                f"trainer.logger: {name} needs the package {BACKENDS[name].package}, which is not installed",
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
    """Return False only when no key is found anywhere. wandb itself would report it after the model is loaded."""
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
    """All wanted loggers as one. One that fails is reported once and disabled; the run continues."""

    def __init__(self, names: Sequence[str], info: RunInfo) -> None:
        self._open: dict[str, Sink] = {}
        for name in dict.fromkeys(names):
            if name in BACKENDS:
                self._guard(name, partial(self._start, name, info))

    def log(self, record: Record) -> None:
        """Pass a record to every logger."""
        for name, sink in list(self._open.items()):
            self._guard(name, partial(sink.log, record))

    def replies(self, step: int, replies: Sequence[Mapping[str, Any]]) -> None:
        """Pass replies to every logger that shows texts."""
        for name, sink in list(self._open.items()):
            if isinstance(sink, TakesText):
                self._guard(name, partial(sink.replies, step, replies))

    def close(self) -> None:
        """Close every logger."""
        for name, sink in list(self._open.items()):
            self._guard(name, sink.close)

    def _start(self, name: str, info: RunInfo) -> None:
        backend = BACKENDS[name]
        module = importlib.import_module(backend.module)
        self._open[name] = getattr(module, backend.name)(info)

    def _guard(self, name: str, action: Callable[[], None]) -> None:
        # A program of others may raise anything. metrics.jsonl has every number, so no logger may end a run.
        try:
            action()
        except Exception as error:
            warn(f"the logger {name} failed and is left out from here on: {type(error).__name__}: {error}")
            self._open.pop(name, None)

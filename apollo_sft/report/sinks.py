"""The loggers of `trainer.logger` that are other people's programs. Each gets the names of `metrics`."""

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


class Backend(NamedTuple):
    """Where a logger is: the package that it needs, the module that speaks to it, and the class there."""

    package: str
    module: str
    name: str


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
    """Raises: ConfigError when the package of a wanted logger is not installed, or wandb cannot log in."""
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
        backend = BACKENDS[name]
        module = importlib.import_module(backend.module)
        self._open[name] = getattr(module, backend.name)(info)

    def _guard(self, name: str, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:  # a foreign program may raise anything; metrics.jsonl holds every number anyway
            warn(f"the logger {name} failed and is left out from here on: {type(error).__name__}: {error}")
            self._open.pop(name, None)

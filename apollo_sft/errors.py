"""Every error that a user can cause or meet. One message says what, found, expected and what to do.

And what no message and no file may show: secrets.
"""

from __future__ import annotations

import os
import re
from typing import TypeVar

T = TypeVar("T")
SECRETS = re.compile(
    r"(?<=://)[^/@\s]+(?=@)"  # credentials of a URL
    r"|\b(?:hf_|gh[opsu]_|github_pat_|glpat-|sk-|xox[bp]-|wandb_v\d_)[A-Za-z0-9_-]{16,}"
    r"|\b(?:AKIA|ASIA)[A-Z0-9]{16}\b"
    r"|(?<=\bBearer )[\w.~+/-]{8,}=*"
)
"""Values that are a secret wherever they stand."""
NAMES = (
    r"passw(?:or)?d|secret|api[_-]?key|(?:access|secret|private)[_-]?key|(?:auth|access|api|bearer|refresh)[_-]?token"
)
SECRET_NAME = re.compile(rf"(?:.*[^a-z])?(?:{NAMES})", re.IGNORECASE)
NAMED = re.compile(rf"((?<![a-z])(?:{NAMES})['\"]?\s*[=:]\s*['\"]?)[^\s'\"&,}}\]]+", re.IGNORECASE)
"""`password=…`, `"api_key": "…"`. The name has to end there: `num_memory_tokens` is none."""
QUERY = re.compile(r"([?&][\w.-]*(?:sig|signature|token|key|credential|password|secret)=)[^&\s'\"]+", re.IGNORECASE)
"""What signs a URL."""
ENVIRONMENT = re.compile(r"(?:.*_)?(?:TOKEN|SECRET|PASSWORD|API_?KEY|ACCESS_KEY(?:_ID)?|SECRET_KEY|PRIVATE_KEY)")
SHORTEST_SECRET = 8


def redact(value: T) -> T:
    """The text without secrets; a list or a dict with all its texts so. Everything else as it is.

    Secrets are known by their form, by the name before them, or because a variable of the environment whose name says
    so has that value.
    """
    if isinstance(value, str):
        return _redact_text(value)  # type: ignore[return-value]
    if isinstance(value, dict):
        return {name: _redact_item(name, item) for name, item in value.items()}  # type: ignore[return-value]
    if isinstance(value, list | tuple):
        return type(value)(redact(item) for item in value)
    return value


def _redact_item(name: object, item: T) -> T | str:
    hidden = isinstance(name, str) and isinstance(item, str | int | float) and SECRET_NAME.fullmatch(name)
    return "***" if hidden else redact(item)


def _redact_text(text: str) -> str:
    for name, secret in os.environ.items():
        if len(secret) >= SHORTEST_SECRET and secret in text and ENVIRONMENT.fullmatch(name):
            text = text.replace(secret, "***")
    text = QUERY.sub(r"\1***", SECRETS.sub("***", text))
    return NAMED.sub(r"\1***", text)


class ApolloError(Exception):
    """Base of all errors shown to users as one message instead of a traceback.

    `what` names the key, or the file and row; the rest is optional and printed one per line.
    """

    exit_code = 1

    def __init__(self, what: str, *, found: object = None, expected: object = None, fix: str | None = None) -> None:
        lines = [what]
        if found is not None:
            lines.append(f"  found:    {found}")
        if expected is not None:
            lines.append(f"  expected: {expected}")
        if fix is not None:
            lines.append(f"  to do:    {fix}")
        super().__init__(redact("\n".join(lines)))


class ConfigError(ApolloError):
    """A key, a value or a combination of keys that cannot be run."""

    exit_code = 2


class DataError(ApolloError):
    """A data file, row, column, template or tokenizer that cannot be trained on."""

    exit_code = 2


class TopologyError(ApolloError):
    """Ranks, devices or mesh sizes that do not fit the machine or the model."""

    exit_code = 2


class ModelError(ApolloError):
    """A model folder or an architecture that cannot be trained exactly."""

    exit_code = 2


class CheckpointError(ApolloError):
    """A run folder, a checkpoint or an exported model that cannot be used, written or verified."""


class UploadError(ApolloError):
    """The run is finished and its model whole, but it was not brought where `trainer.default_hdfs_dir` says."""

    exit_code = 3


class AlreadyDone(ApolloError):  # noqa: N818 - it is no error: nothing is left to do
    """The run is complete under the same configuration."""

    exit_code = 0


class Preempted(ApolloError):  # noqa: N818 - the run can go on
    """A signal asked for the end; the state is saved and the same command goes on from it."""

    exit_code = 75


class Stopped(BaseException):
    """A signal, raised where the main thread is. Not an Exception: no library may take it for a failure of its own."""

    exit_code = Preempted.exit_code


class TrainingError(ApolloError):
    """A run that had to stop: a loss or a gradient that is not finite."""

"""Keys whose feature is not built yet: one line each, to be deleted with the feature."""

from __future__ import annotations

from collections.abc import Callable

from apollo_sft.config.schema import SftConfig
from apollo_sft.errors import ConfigError

PENDING: list[tuple[str, Callable[[SftConfig], bool], str]] = [
    ("model.compile", lambda c: c.model.compile, "leave it false"),
]
"""(key, whether the config uses it, what to do instead)."""


def refuse_pending(config: SftConfig) -> None:
    """Raises: ConfigError naming every key in use whose feature is not there."""
    problems = [
        str(ConfigError(f"{key} is not built yet", fix=instead)) for key, used, instead in PENDING if used(config)
    ]
    if problems:
        raise ConfigError("\n".join(problems))

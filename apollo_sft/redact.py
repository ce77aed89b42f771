"""Replace secrets in what is shown and written by `***`.

A secret is recognised by its form (`hf_…`, the password of a URL), by the name before it (`api_key=…`), or as the value
of an environment variable with such a name.
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
"""Values that are a secret wherever they occur."""


NAMES = (
    r"passw(?:or)?d|secret|api[_-]?key|(?:access|secret|private)[_-]?key|(?:auth|access|api|bearer|refresh)[_-]?token"
)


SECRET_NAME = re.compile(rf"(?:.*[^a-z])?(?:{NAMES})", re.IGNORECASE)


NAMED = re.compile(rf"((?<![a-z])(?:{NAMES})['\"]?\s*[=:]\s*['\"]?)[^\s'\"&,}}\]]+", re.IGNORECASE)
"""`password=…`, `"api_key": "…"`. The name has to end there: `num_memory_tokens` does not match."""


QUERY = re.compile(r"([?&][\w.-]*(?:sig|signature|token|key|credential|password|secret)=)[^&\s'\"]+", re.IGNORECASE)
"""The signature or key in the query of a URL."""


ENVIRONMENT = re.compile(r"(?:.*_)?(?:TOKEN|SECRET|PASSWORD|API_?KEY|ACCESS_KEY(?:_ID)?|SECRET_KEY|PRIVATE_KEY)")


SHORTEST_SECRET = 8
"""The least length of a value of the environment. A shorter one, such as `true`, may occur in ordinary text."""


def redact(value: T) -> T:
    """Return a text without secrets; a list or a dict with all its texts redacted; everything else unchanged."""
    secrets = []
    for name, secret in os.environ.items():
        if len(secret) >= SHORTEST_SECRET and ENVIRONMENT.fullmatch(name):
            secrets.append(secret)
    return _redact(value, secrets)


def _redact(value: T, secrets: list[str]) -> T:
    """Redact a value. `secrets`: those of the environment."""
    if isinstance(value, str):
        return _redact_text(value, secrets)  # type: ignore[return-value]
    if isinstance(value, dict):
        return {name: _redact_item(name, item, secrets) for name, item in value.items()}  # type: ignore[return-value]
    if isinstance(value, list | tuple):
        return type(value)(_redact(item, secrets) for item in value)
    return value


def _redact_item(name: object, item: T, secrets: list[str]) -> T | str:
    if isinstance(name, str) and isinstance(item, str | int | float) and SECRET_NAME.fullmatch(name):
        return "***"
    return _redact(item, secrets)


def _redact_text(text: str, secrets: list[str]) -> str:
    # Values of the environment come first: the patterns below could cut one in two, and leave a part of it.
    for secret in secrets:
        text = text.replace(secret, "***")
    text = QUERY.sub(r"\1***", SECRETS.sub("***", text))
    return NAMED.sub(r"\1***", text)

"""Single values of a configuration, by their keys: read, and changed in a copy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from apollo_sft.config.compose import validate
from apollo_sft.config.schema import ModelConfig, SftConfig


def with_values(config: SftConfig, values: Mapping[str, Any]) -> SftConfig:
    """The config with other values, checked again. Keys are dotted. Raises: ConfigError."""
    raw = config.model_dump()
    for key, value in values.items():
        *sections, name = key.split(".")
        section = raw
        for part in sections:
            section = section[part]
        section[name] = value
    return validate(raw)


def value_of(config: SftConfig, key: str) -> Any:
    """Of a dotted key."""
    value: Any = config
    for part in key.split("."):
        value = getattr(value, part)
    return value


def trains_adapter(model: ModelConfig) -> bool:
    """Return whether LoRA is trained, new or continued, in place of all weights."""
    return model.lora_rank > 0 or model.lora_adapter_path is not None

"""Read single values of a configuration by their keys, and change them in a copy."""

from __future__ import annotations

from collections.abc import Mapping
from operator import attrgetter
from typing import Any

from apollo_sft.config.compose import validate
from apollo_sft.config.schema import ModelConfig, SftConfig


def with_values(config: SftConfig, values: Mapping[str, Any]) -> SftConfig:
    """Return the config with other values, by dotted keys, validated again. Raises: ConfigError."""
    raw = config.model_dump()
    for key, value in values.items():
        *sections, name = key.split(".")
        section = raw
        for part in sections:
            section = section[part]
        section[name] = value
    return validate(raw)


def value_of(config: SftConfig, key: str) -> Any:
    """Return the value of a dotted key."""
    return attrgetter(key)(config)


def trains_adapter(model: ModelConfig) -> bool:
    """Return whether LoRA is trained, new or continued, instead of all weights."""
    return model.lora_rank > 0 or model.lora_adapter_path is not None

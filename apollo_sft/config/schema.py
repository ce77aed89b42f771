"""The configuration as frozen, strictly typed values, and the facts about each key.

A key is defined once, in `sections/`: type, range, default, what a change of it changes, an example, and a docstring.
sft_trainer.yaml, `--help` and docs/configuration.md are generated from it.
"""

from __future__ import annotations

from typing import Annotated, Any

from apollo_sft.config.keys import AS_SET, LAYOUT, NOTHING, Key, Section, keys_below
from apollo_sft.config.schema_types import Count, FileSet, Source
from apollo_sft.config.sections.data import CustomClsConfig, DataConfig, MultiturnConfig
from apollo_sft.config.sections.model import FsdpConfig, ModelConfig, WrapPolicyConfig
from apollo_sft.config.sections.optim import OptimConfig
from apollo_sft.config.sections.trainer import CheckpointConfig, TrainerConfig

__all__ = [
    "KEYS",
    "NEUTRAL",
    "CheckpointConfig",
    "CustomClsConfig",
    "DataConfig",
    "FileSet",
    "FsdpConfig",
    "ModelConfig",
    "MultiturnConfig",
    "OptimConfig",
    "SftConfig",
    "Source",
    "TrainerConfig",
    "WrapPolicyConfig",
]


class SftConfig(Section):
    """The whole configuration."""

    data: DataConfig
    model: ModelConfig
    optim: OptimConfig
    trainer: TrainerConfig

    ulysses_sequence_parallel_size: Annotated[Count, Key(changes=LAYOUT, neutral=1, example="2")] = 1
    """How many ranks share one sequence (Ulysses), 1 or more. The number of ranks must be a multiple of it."""

    use_remove_padding: Annotated[bool, Key(changes=NOTHING)] = False
    """Accepted for compatibility: there never is padding."""


KEYS = keys_below(SftConfig)
"""Every key by its dotted name, in the order of the yaml."""

NEUTRAL: dict[str, Any] = {
    name: key.neutral for name, key in KEYS.items() if LAYOUT in key.changes and key.neutral is not AS_SET
}
"""The plainest layout. The other keys of the layout describe the machines, or name a kernel or a class of layers."""

"""The folder that is checked, and a problem that a check found. Training does not come here."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from apollo_sft.config.schema import DataConfig
from apollo_sft.types import TensorSpec

NAMED = 3
"""How many names a message lists."""


class WrongError(Exception):
    """A problem that a check found. `name`: as docs/handoff.md lists it. `is_note`: RL can work with it."""

    def __init__(self, name: str, what: str, fix: str, is_note: bool = False) -> None:
        super().__init__(what)
        self.name = name
        self.what = what
        self.fix = fix
        self.is_note = is_note


@dataclass
class Subject:
    """A folder, how it is to be checked, and what the checks have opened so far, in their order."""

    folder: Path

    data: DataConfig
    """The keys by which rows are read and rendered."""

    run: Path | None = None
    """The run that wrote the folder."""

    base: Path | None = None
    """The folder of its base model, where that is on this machine."""

    of_base: frozenset[str] = frozenset()
    """Names of the base's tensors."""

    files: tuple[str, ...] = ()
    """Parquet files whose rows are rendered; () for none."""

    trust_remote_code: bool = False
    generate: bool = True

    reader: tuple[int, int] | None = None
    """The version of transformers that is to open the folder; None where none is given."""

    max_new_tokens: int | None = None
    """The longest reply; None is twice the longest one of the rows."""

    config: dict[str, Any] = field(default_factory=dict)
    hf_config: Any = None

    model: Any = None
    """The model of config.json, on meta."""

    tensors: dict[str, TensorSpec] = field(default_factory=dict)
    tokenizer: Any = None

    prompts: list[str] = field(default_factory=list)
    """Some prompts that were rendered."""

    longest_reply: int = 0

    @property
    def model_state(self) -> dict[str, torch.Tensor]:
        """Return the model's parameters and buffers, on meta, by name."""
        state: dict[str, torch.Tensor] = self.model.state_dict(keep_vars=True)
        return state


def some(names: list[str]) -> str:
    """Return the first few names."""
    shown = names[:NAMED]
    if len(names) > NAMED:
        shown = [*shown, "…"]
    return ", ".join(shown)

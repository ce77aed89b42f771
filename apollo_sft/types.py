"""The values that travel between the layers. No behaviour beyond what their shape implies."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import torch

IGNORE_INDEX = -100


def ignore(*_: object) -> None:
    """Do nothing: for callbacks that nobody listens to."""


Message = dict[str, Any]
"""One chat message: `role`, `content`, and what the template reads besides (`tool_calls`, `reasoning_content`, …)."""


@dataclass(frozen=True, slots=True)
class RowRef:
    """Where a row comes from: the file as the user named it, and the row's index in that file, from 0."""

    file: str
    row: int

    def __str__(self) -> str:
        return f"{self.file} row {self.row}"


@dataclass(frozen=True, slots=True)
class Conversation:
    """One validated row. `template_kwargs` are this row's own template arguments (for example `enable_thinking`).

    `untrained`: indices of messages that the row itself takes out of training.
    """

    messages: list[Message]
    tools: list[dict[str, Any]] | None
    template_kwargs: dict[str, Any]
    ref: RowRef
    untrained: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class Sample:
    """One rendered conversation.

    `input_ids` and `labels` are int32 of shape (tokens,). `labels[t]` is the token that position t must predict,
    or IGNORE_INDEX: already shifted, never to be shifted again. `turns` are the indices of the trained messages.
    """

    input_ids: np.ndarray
    labels: np.ndarray
    ref: RowRef
    turns: tuple[int, ...]

    @property
    def num_targets(self) -> int:
        return int((self.labels != IGNORE_INDEX).sum())


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """One forward on one rank: documents packed into one row, without padding.

    `input_ids`, `labels`, `position_ids`: int64 of shape (1, tokens); positions restart at 0 in every document.
    `document_starts`: int32 of shape (documents + 1,), the first position of each document and the total.
    `sources`: the source of the data that each sample is of, int64 of shape (samples,); None where there is only one.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    position_ids: torch.Tensor
    document_starts: torch.Tensor
    num_targets: int
    sources: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Shape and dtype (safetensors spelling, for example `BF16`) of one tensor in a model file."""

    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True, slots=True)
class Growth:
    """Tokens that are added to a base model, and their ids.

    `held`: rows of its embeddings, of which the first `known` stand for tokens that it had; `rows`: with the new ones.
    An id below `held` is that of a row that stood for nothing.
    """

    tokens: tuple[str, ...]
    ids: tuple[int, ...]
    known: int
    held: int
    rows: int


@dataclass(frozen=True, slots=True)
class BaseModel:
    """The model a run starts from, as it lies on disk.

    `source` is what the user wrote (a path or a hub id); `folder` the local copy; `tensors` what its safetensors
    files hold, by name (empty when the base has no safetensors files). With `growth`, `config` is that of the grown
    model, and `tensors` are still what the files hold.
    `added_tokens`: what the tokenizer must know as added tokens besides its own, new ones and words of its vocabulary.
    `untied`: names of tensors that the base's own config.json ties, while its files hold a value of its own for each;
    `config` does not tie them. `carried`: files of the folder that are copied beside the trained weights; `left_out`:
    why others are not, by name.
    """

    source: str
    folder: Path
    config: dict[str, Any]
    tensors: dict[str, TensorSpec]
    growth: Growth | None = None
    added_tokens: tuple[str, ...] = ()
    untied: tuple[str, ...] = ()
    carried: tuple[str, ...] = ()
    left_out: Mapping[str, str] = field(default_factory=dict)

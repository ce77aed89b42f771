"""The values that the layers pass to each other. They have no behaviour beyond what their fields imply."""

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
    """Do nothing: the default of a callback."""


Message = dict[str, Any]
"""One chat message: `role`, `content`, and other keys of the template (`tool_calls`, `reasoning_content`, …)."""


REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")
"""The keys of a message that templates and data sets have for the reasoning."""

RESERVED_ARGUMENTS = ("messages", "tools", "documents", "add_generation_prompt")
"""Arguments of chat templates that the trainer sets."""


@dataclass(frozen=True, slots=True)
class RowRef:
    """The place that a row comes from."""

    file: str
    """The file as the user named it."""
    row: int
    """The row's index in that file, from 0."""

    def __str__(self) -> str:
        return f"{self.file} row {self.row}"


@dataclass(frozen=True, slots=True)
class Conversation:
    """One validated row."""

    messages: list[Message]
    tools: list[dict[str, Any]] | None
    template_kwargs: dict[str, Any]
    """This row's own template arguments, for example `enable_thinking`."""
    ref: RowRef
    untrained: frozenset[int] = frozenset()
    """Indices of messages that the row itself excludes from training."""
    thinking: Mapping[int, bool] = field(default_factory=dict)
    """Index of a message -> whether it was asked for with thinking, where the message says so itself."""
    unread: tuple[str, ...] = ()
    """Columns of the row that hold something that is said, and that no key names."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One rendered conversation."""

    input_ids: np.ndarray
    """int32 of shape (tokens,)."""
    labels: np.ndarray
    """int32 of shape (tokens,). `labels[t]` is the token that position t must predict, or IGNORE_INDEX: already
    shifted, never to be shifted again."""
    ref: RowRef
    turns: tuple[int, ...]
    """Indices of the trained messages."""

    @property
    def num_targets(self) -> int:
        """Return the number of positions with a label."""
        return int((self.labels != IGNORE_INDEX).sum())


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """One forward on one rank: documents packed into one row, without padding."""

    input_ids: torch.Tensor
    """int64 of shape (1, tokens)."""
    labels: torch.Tensor
    """int64 of shape (1, tokens)."""
    position_ids: torch.Tensor
    """int64 of shape (1, tokens). Positions restart at 0 in every document."""
    document_starts: torch.Tensor
    """int32 of shape (documents + 1,): the first position of each document, and the total."""
    num_targets: int
    sources: torch.Tensor | None = None
    """The source of the data of each sample, int64 of shape (samples,); None where there is only one source."""


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Shape and dtype (safetensors spelling, for example `BF16`) of one tensor in a model file."""

    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True, slots=True)
class AddedTokens:
    """Tokens that are added to a base model.

    Embeddings often have more rows than there are tokens. A base with 100 tokens and 104 rows to which 6 tokens are
    added, for example: known=100, held=104, ids 100 to 105, rows=106.
    """

    tokens: tuple[str, ...]
    ids: tuple[int, ...]
    """Their ids. One below `held` has a row that no token used before."""
    known: int
    """Number of the first rows that belong to tokens of the base."""
    held: int
    """Number of rows in the base's files."""
    rows: int
    """Number of rows with the new tokens."""


@dataclass(frozen=True, slots=True)
class BaseModel:
    """The model that a run starts from, on disk."""

    source: str
    """A path or a hub id, as the user wrote it."""
    folder: Path
    """The local copy."""
    config: dict[str, Any]
    """config.json; with `new_tokens`, that of the model with the added tokens."""
    tensors: dict[str, TensorSpec]
    """The tensors in its safetensors files, by name, without added tokens; empty when it has no such files."""
    new_tokens: AddedTokens | None = None
    added_tokens: tuple[str, ...] = ()
    """Tokens that the tokenizer must get as added tokens: new ones, and words of its vocabulary."""
    untied: tuple[str, ...] = ()
    """Names of tensors that the base's own config.json ties, while its files hold a value of its own for each. `config`
    does not tie them."""
    carried: tuple[str, ...] = ()
    """Files of the folder that are copied beside the trained weights."""
    left_out: Mapping[str, str] = field(default_factory=dict)
    """The reasons why other files are not copied, by name."""

"""The section `optim`: the optimizer and its learning rate."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from apollo_sft.config.keys import MODEL, Key, Section, unused_without
from apollo_sft.config.schema_types import Share, as_tuple, lower


class OptimConfig(Section):
    """The optimizer and its learning rate."""

    name: Annotated[Literal["adamw", "muon", "adamw_8bit"], BeforeValidator(lower), Key(changes=MODEL)] = "adamw"
    """The optimizer: adamw, muon (Muon for the matrices of the layers; AdamW for embeddings, head, vectors and fused
    experts) or adamw_8bit (AdamW that keeps each of its averages in one byte). Both not with strategy=fsdp.
    docs/memory.md
    """

    lr: Annotated[float, Field(gt=0), Key(changes=MODEL, example="2e-5")] = 1e-5
    """Peak learning rate, above 0."""

    betas: Annotated[
        tuple[Annotated[float, Field(ge=0, lt=1)], ...],
        Field(min_length=2, max_length=2),
        BeforeValidator(as_tuple),
        Key(changes=MODEL, example="[0.9,0.999]"),
    ] = (0.9, 0.95)
    """How fast AdamW's averages of the gradient and of the squared gradient decay, each in [0, 1)."""

    weight_decay: Annotated[float, Field(ge=0), Key(changes=MODEL, example="0.1")] = 0.01
    """Weight decay of matrices, 0 or more. Norm gains and biases are never decayed."""

    warmup_steps_ratio: Annotated[Share, Key(changes=MODEL, example="0.03")] = 0.1
    """The share of all steps in which the learning rate rises, 0 to 1. The spelling lr_warmup_steps_ratio means the
    same.
    """

    lr_warmup_steps: Annotated[int, Field(ge=-1), Key(changes=MODEL, example="100")] = -1
    """The same as a number of steps, 0 or more; -1 uses the ratio. Only one of the two may be set."""

    clip_grad: Annotated[Annotated[float, Field(ge=0)] | None, Key(changes=MODEL, example="null")] = 1.0
    """The largest L2 norm of the gradient over all weights; a longer gradient is scaled down to it. null or 0 does not
    clip. The norm is logged either way.
    """

    lr_scheduler: Annotated[Literal["cosine", "wsd"], Key(changes=MODEL)] = "cosine"
    """The learning rate after the warm-up: cosine (it falls until the end) or wsd (it stays, then falls)."""

    min_lr_ratio: Annotated[Share, Key(changes=MODEL, example="0.1")] = 0.0
    """The learning rate at the end, as a share of lr, 0 to 1."""

    stable_ratio: Annotated[
        Share, Key(changes=MODEL, example="0.8", unused=unused_without("optim.lr_scheduler=wsd"))
    ] = 0.9
    """wsd: the share of the steps after the warm-up in which the learning rate stays at lr, 0 to 1."""

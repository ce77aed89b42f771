"""The module that is sharded and trained: a causal language model of transformers with our loss at its end."""

from __future__ import annotations

from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from apollo_sft.model.head import Sources, attach_loss, head_spec
from apollo_sft.model.load import check_longest
from apollo_sft.types import IGNORE_INDEX, MicroBatch

KEPT = frozenset(
    {
        "aten::mm",
        "aten::addmm",
        "aten::_grouped_mm",
        "aten::_scaled_dot_product_flash_attention",
        "aten::_scaled_dot_product_flash_attention_for_cpu",
        "aten::_scaled_dot_product_efficient_attention",
        "aten::_scaled_dot_product_cudnn_attention",
        "torch_attn::_varlen_attn",
        "flash_attn::_flash_attn_varlen_forward",
    }
)
"""Operators whose outputs selective checkpointing keeps: their cost grows faster than their output. Batched products of
explicit attention are not among them: their outputs are scores, tokens times tokens."""


class SftModel(nn.Module):
    """A causal language model whose forward returns the sum of the cross-entropy over the targets.

    The head runs inside this forward, at target positions only. A micro-batch without a target still runs it, on no
    row: every rank then reduces the gradients of the same parameters.
    """

    reduces_once: bool
    """Reduce gradients over ranks at the last micro-batch of a step only."""
    strategy: str
    """The name of the sharding strategy."""

    def __init__(self, causal_lm: Any, sp_rank: int = 0, sp_size: int = 1) -> None:
        super().__init__()
        self.causal_lm = causal_lm
        self.sp_rank = sp_rank
        self.sp_size = sp_size
        self.reduces_once = False
        self.strategy = "fsdp2"
        self.attach_head()

    def attach_head(self) -> None:
        """Give the head its loss; again after adapters were injected, since the head may be another module then."""
        attach_loss(self.causal_lm.get_output_embeddings(), head_spec(self.causal_lm.config))

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        document_starts: Tensor,
        longest_document: int,
        target_positions: Tensor,
        target_labels: Tensor | None,
        target_sources: Sources | None = None,
    ) -> Any:
        """Return the loss sum, or without labels the most likely token after each target position.

        `input_ids`, `position_ids`: (1, tokens / sp), this rank's slice of the row.
        `document_starts`: int32, (documents + 1,), and `longest_document` are those of the whole row.
        `target_positions`, `target_labels`: (targets of the slice,), the positions in the slice and their labels.
        The loss sum is a float64 scalar; with `target_sources` it comes with the sums of the sources, as in
        `head.target_loss`.
        """
        check_longest(self.causal_lm.config, longest_document)
        hidden = self.causal_lm.base_model(
            input_ids=input_ids,
            position_ids=position_ids,
            use_cache=False,  # a cache would switch document isolation off in some architectures
            document_starts=document_starts,
            longest_document=longest_document,
        ).last_hidden_state

        head = self.causal_lm.get_output_embeddings()
        rows = hidden[0].index_select(0, target_positions)
        if target_labels is None:
            return head.best(rows)
        return head.loss(rows, target_labels, target_sources)

    def loss_sum(self, micro_batch: MicroBatch, device: torch.device, of_sources: Tensor | None = None) -> Tensor:
        """Return the loss sum over this rank's slice of a micro-batch on the CPU.

        `of_sources`: float64 of shape (sources,), to which the sums of its sources are added, unless it is empty.
        """
        inputs = self.inputs(micro_batch, device)
        if of_sources is None or not len(of_sources):
            return cast(Tensor, self(*inputs))

        sources = _sent(self._target_sources(micro_batch), device)
        loss_sum, sums = self(*inputs, (sources, len(of_sources)))
        of_sources += sums
        return cast(Tensor, loss_sum)

    def _target_sources(self, micro_batch: MicroBatch) -> Tensor:
        """Return the source of each target of this rank's slice, int64 of shape (targets of the slice,)."""
        assert micro_batch.sources is not None, "a loader of several sources gives each sample's source"
        labels = micro_batch.labels.chunk(self.sp_size, dim=1)[self.sp_rank][0]

        # Positions in the whole row, as the starts of documents are.
        before = self.sp_rank * len(labels)
        at = (labels != IGNORE_INDEX).nonzero()[:, 0] + before
        return micro_batch.sources[torch.bucketize(at, micro_batch.document_starts, right=True) - 1]

    def next_tokens(self, micro_batch: MicroBatch, device: torch.device) -> Tensor:
        """Return the most likely token after each position of this rank's slice that has a label, in their order.

        int64 of shape (labels of the slice,). The values of the labels are not used.
        """
        *inputs, _ = self.inputs(micro_batch, device)
        return cast(Tensor, self(*inputs, None))

    def inputs(self, micro_batch: MicroBatch, device: torch.device) -> tuple[Any, ...]:
        """Return the arguments of `forward` for this rank's slice, on the device."""
        longest = int(torch.diff(micro_batch.document_starts).max())
        ids = micro_batch.input_ids.chunk(self.sp_size, dim=1)[self.sp_rank]
        positions = micro_batch.position_ids.chunk(self.sp_size, dim=1)[self.sp_rank]
        labels = micro_batch.labels.chunk(self.sp_size, dim=1)[self.sp_rank][0]

        # Targets are found on the CPU: on a GPU the host would have to wait for their number.
        at = (labels != IGNORE_INDEX).nonzero()[:, 0]
        return (
            _sent(ids, device),
            _sent(positions, device),
            _sent(micro_batch.document_starts, device),
            longest,
            _sent(at, device),
            _sent(labels[at], device),
        )


def _sent(part: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor to the device while the host continues."""
    # From memory that is not pinned, the host may wait until the device has done its work so far.
    if device.type == "cuda" and not part.is_pinned():
        part = part.pin_memory()
    return part.to(device, non_blocking=True)


def enable_checkpointing(causal_lm: Any, selective: bool) -> None:
    """Recompute activations in the backward: those of whole layers, or with `selective` all but the `KEPT`."""
    how: dict[str, Any] = {"use_reentrant": False}
    if selective:
        how["context_fn"] = partial(create_selective_checkpoint_contexts, _keep_or_recompute)
    causal_lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs=how)


def _keep_or_recompute(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    del context, args, kwargs
    if operator.name() in KEPT:
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE

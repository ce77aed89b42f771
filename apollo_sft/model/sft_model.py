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
"""Operators whose outputs selective checkpointing keeps: their cost grows faster than their output. Not the batched
products of attention that is written out: those outputs are scores, tokens times tokens."""


class SftModel(nn.Module):
    """`forward(micro_batch)` gives the sum of the cross-entropy over its targets.

    The head runs inside this forward, at target positions only. A micro-batch without a target still runs it, on no
    row: every rank then reduces the gradients of the same parameters. `reduces_once`: gradients are reduced over ranks
    at the last micro-batch of a step only. `strategy`: how it is sharded, if it is.
    """

    def __init__(self, causal_lm: Any, sp_rank: int = 0, sp_size: int = 1) -> None:
        super().__init__()
        self.causal_lm = causal_lm
        self.sp_rank = sp_rank
        self.sp_size = sp_size
        self.reduces_once = False
        self.strategy = "fsdp2"
        self.attach_head()

    def attach_head(self) -> None:
        """Once more when adapters have been put in: the head may be another module then."""
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
        """`input_ids`, `position_ids`: (1, tokens / sp), this rank's slice of the row.

        `document_starts`: int32, (documents + 1,), and `longest_document` are those of the whole row.
        `target_positions`, `target_labels`: (targets of the slice,), where in the slice a label is, and which.
        Returns the loss sum, a float64 scalar, with `target_sources` and those of the sources, as `head.target_loss`;
        without labels the most likely token after each of these positions.
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
        return head.best(rows) if target_labels is None else head.loss(rows, target_labels, target_sources)

    def loss_sum(self, micro_batch: MicroBatch, device: torch.device, of_sources: Tensor | None = None) -> Tensor:
        """The loss sum over this rank's slice of a micro-batch that lies on the CPU.

        `of_sources`: float64 of shape (sources,), to which the sums of its sources are added; None or empty: unasked.
        """
        inputs = self.inputs(micro_batch, device)
        if of_sources is None or not len(of_sources):
            return cast(Tensor, self(*inputs))
        sources = _sent(self._target_sources(micro_batch), device)
        loss_sum, sums = self(*inputs, (sources, len(of_sources)))
        of_sources += sums
        return cast(Tensor, loss_sum)

    def _target_sources(self, micro_batch: MicroBatch) -> Tensor:
        """The source of each target of this rank's slice, int64 of shape (targets of the slice,)."""
        assert micro_batch.sources is not None, "a loader of several sources says which"
        labels = micro_batch.labels.chunk(self.sp_size, dim=1)[self.sp_rank][0]
        before = self.sp_rank * len(labels)
        at = (labels != IGNORE_INDEX).nonzero()[:, 0] + before
        return micro_batch.sources[torch.bucketize(at, micro_batch.document_starts, right=True) - 1]

    def next_tokens(self, micro_batch: MicroBatch, device: torch.device) -> Tensor:
        """The most likely token after each position of this rank's slice that has a label, in their order.

        int64 of shape (labels of the slice,). What the labels are is not looked at.
        """
        *inputs, _ = self.inputs(micro_batch, device)
        return cast(Tensor, self(*inputs, None))

    def inputs(self, micro_batch: MicroBatch, device: torch.device) -> tuple[Any, ...]:
        """What `forward` takes of this rank's slice.

        Targets are found before anything travels: a GPU need not be waited for.
        """
        longest = int(torch.diff(micro_batch.document_starts).max())
        whole = (micro_batch.input_ids, micro_batch.position_ids, micro_batch.labels)
        ids, positions, labels = (tensor.chunk(self.sp_size, dim=1)[self.sp_rank] for tensor in whole)
        at = (labels[0] != IGNORE_INDEX).nonzero()[:, 0]
        parts = (ids, positions, micro_batch.document_starts, at, labels[0][at])
        ids, positions, starts, at, targets = (_sent(part, device) for part in parts)
        return ids, positions, starts, longest, at, targets


def _sent(part: Tensor, device: torch.device) -> Tensor:
    """On the device, where it arrives while the host goes on. A copy out of memory that is not pinned may wait for what
    the device has still to do."""
    if device.type == "cuda" and not part.is_pinned():
        part = part.pin_memory()
    return part.to(device, non_blocking=True)


def enable_checkpointing(causal_lm: Any, selective: bool) -> None:
    """Compute activations again in the backward: whole layers, or with `selective` what is between the `KEPT`."""
    how: dict[str, Any] = {"use_reentrant": False}
    if selective:
        how["context_fn"] = partial(create_selective_checkpoint_contexts, _keep_or_recompute)
    causal_lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs=how)


def _keep_or_recompute(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    del context, args, kwargs
    return CheckpointPolicy.MUST_SAVE if operator.name() in KEPT else CheckpointPolicy.PREFER_RECOMPUTE

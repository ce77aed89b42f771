"""The output head and the loss in one function, at target positions only, without the logits of a whole batch."""

from __future__ import annotations

from dataclasses import dataclass
from types import MethodType
from typing import Any, cast

import torch
from torch import Tensor, nn

CHUNK_ELEMENTS = 2**24
"""Logits that exist at one time, in elements: rows of a chunk times the vocabulary."""


@dataclass(frozen=True, slots=True)
class HeadSpec:
    """How an architecture turns `hidden @ weight.T` into logits: multiplied by `scale`, then soft-capped."""

    scale: float = 1.0
    softcap: float | None = None


def head_spec(config: Any) -> HeadSpec:
    """What the model's config says about its logits (Granite divides, Cohere multiplies, Gemma 2 soft-caps them)."""
    config = config.get_text_config()
    scale = float(getattr(config, "logit_scale", None) or 1.0) / float(getattr(config, "logits_scaling", None) or 1.0)
    return HeadSpec(scale=scale, softcap=getattr(config, "final_logit_softcapping", None))


def attach_loss(head: nn.Module, spec: HeadSpec) -> None:
    """Give the head module a method `loss(hidden, labels)`, so that it can be sharded on its own and still be used.

    `hidden`: (targets, hidden size); `labels`: (targets,). Returns the sum of the cross-entropy, a float64 scalar.
    """

    def loss(self: nn.Module, hidden: Tensor, labels: Tensor) -> Tensor:
        return target_loss(hidden, cast(Tensor, self.weight), getattr(self, "bias", None), labels, spec)

    head.loss = MethodType(loss, head)  # type: ignore[assignment]


def target_loss(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, spec: HeadSpec) -> Tensor:
    """Sum of cross-entropy over the targets, float64 scalar.

    `hidden`: (targets, hidden size); `weight`: (vocabulary, hidden size); `labels`: (targets,).
    Runs chunk by chunk. Where a gradient is needed it is formed in the forward, so that no logits are kept or computed
    twice. Source: the idea of fused linear cross-entropy (Liger Kernel, arXiv:2410.10989).
    """
    grad = torch.is_grad_enabled()
    return cast(Tensor, _TargetLoss.apply(hidden, weight, bias, labels, spec, grad))  # type: ignore[no-untyped-call]


class _TargetLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, spec: HeadSpec, grad: bool
    ) -> Tensor:
        wants_hidden, wants_weight, wants_bias = (grad and wanted for wanted in ctx.needs_input_grad[:3])
        wide = torch.promote_types(weight.dtype, torch.float32)
        loss = torch.zeros((), dtype=torch.float64, device=hidden.device)
        grad_hidden = torch.empty_like(hidden, memory_format=torch.contiguous_format) if wants_hidden else None
        grad_weight = torch.zeros(weight.shape, dtype=wide, device=weight.device) if wants_weight else None
        grad_bias = torch.zeros(weight.shape[0], dtype=wide, device=weight.device) if wants_bias else None
        rows = max(1, CHUNK_ELEMENTS // weight.shape[0])
        for start in range(0, hidden.shape[0], rows):
            chunk = slice(start, start + rows)
            chunk_loss, grad_raw = _chunk(nn.functional.linear(hidden[chunk], weight, bias), labels[chunk], spec, grad)
            loss += chunk_loss
            if grad_raw is None:
                continue
            grad_logits = grad_raw.to(weight.dtype)
            if grad_hidden is not None:
                torch.mm(grad_logits, weight, out=grad_hidden[chunk])
            if grad_weight is not None:
                _add_product(grad_weight, grad_logits, hidden[chunk])
            if grad_bias is not None:
                grad_bias += grad_raw.sum(0)
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        grads = (None if g is None else g * grad_loss.to(g.dtype) for g in ctx.saved_tensors)
        return (*grads, None, None, None)


def _chunk(raw: Tensor, labels: Tensor, spec: HeadSpec, grad: bool) -> tuple[Tensor, Tensor | None]:
    """Loss of one chunk and its gradient with respect to `raw`, in float32 or wider. `raw`: (rows, vocabulary)."""
    logits = raw.to(torch.promote_types(raw.dtype, torch.float32))
    if spec.scale != 1.0:
        logits = logits * spec.scale
    if spec.softcap is not None:
        logits = spec.softcap * torch.tanh(logits / spec.softcap)
    log_normaliser = torch.logsumexp(logits, dim=-1, keepdim=True)
    index = labels[:, None]
    loss = (log_normaliser - logits.gather(1, index)).sum(dtype=torch.float64)
    if not grad:
        return loss, None
    grad_logits = torch.exp(logits - log_normaliser)
    grad_logits.scatter_add_(1, index, torch.full_like(index, -1, dtype=grad_logits.dtype))
    if spec.softcap is not None:
        grad_logits *= 1 - (logits / spec.softcap) ** 2
    if spec.scale != 1.0:
        grad_logits *= spec.scale
    return loss, grad_logits


def _add_product(total: Tensor, grad_logits: Tensor, hidden: Tensor) -> None:
    """total += grad_logits.T @ hidden, accumulated in total's dtype."""
    if total.dtype == hidden.dtype:
        total.addmm_(grad_logits.t(), hidden)
    else:
        total += grad_logits.t() @ hidden

"""The output head and the loss in one function, at target positions only, without the logits of a whole batch.

With 1,000 targets and a vocabulary of 150,000, all logits would take 600 MB in float32, and their gradient as much.
Here they exist for 256 targets at a time. For each chunk the forward computes

    logits = x W'      loss += -sum(log_softmax(logits)[labels])      G = softmax(logits) - onehot(labels)
    grad x = G W       grad W += G' x

and keeps only the gradients of x and W. The backward multiplies them with the gradient of the loss, a scalar.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import MethodType
from typing import Any, cast

import torch
from torch import Tensor, nn

CHUNK_ROWS = 256
"""The least number of targets whose logits exist at one time."""


Sources = tuple[Tensor, int]
"""The source of the data of each target, int64 of shape (targets,), and the number of sources."""


@dataclass(frozen=True, slots=True)
class HeadSpec:
    """The way of an architecture from `hidden @ weight.T` to logits: multiplied by `scale`, then soft-capped."""

    scale: float = 1.0
    softcap: float | None = None


def head_spec(config: Any) -> HeadSpec:
    """Read the spec from a model's config (Granite divides logits, Cohere multiplies, Gemma 2 soft-caps them)."""
    config = config.get_text_config()
    scale = float(getattr(config, "logit_scale", None) or 1.0) / float(getattr(config, "logits_scaling", None) or 1.0)
    return HeadSpec(scale=scale, softcap=getattr(config, "final_logit_softcapping", None))


def chunk_rows(hidden_size: int) -> int:
    """Return the number of targets whose logits exist at one time.

    Each chunk reads and writes all of the weight's gradient, so a wide head takes longer chunks: the logits and their
    gradient are then a quarter of that buffer.
    """
    return max(CHUNK_ROWS, hidden_size // 8)


def attach_loss(head: nn.Module, spec: HeadSpec) -> None:
    """Give the head module two methods, so that it can be sharded on its own and still be used.

    `head`: a linear module, or PEFT's LoRA around one. `hidden`: (targets, hidden size); `labels`: (targets,).
    `loss(hidden, labels, sources)` returns what `target_loss` does; `best(hidden)` the most likely token after each
    row, int64 of shape (targets,).
    """

    def loss(self: nn.Module, hidden: Tensor, labels: Tensor, sources: Sources | None = None) -> Any:
        return target_loss(*_factors(self, hidden), labels, spec, sources)

    def best(self: nn.Module, hidden: Tensor) -> Tensor:
        factors, bias = _factors(self, hidden)
        (x, weight), *more = factors
        raw = nn.functional.linear(x, weight, bias)
        for y, w in more:  # the low-rank product of an adapter
            raw = raw + nn.functional.linear(y, w)
        return _logits(raw, spec).argmax(dim=-1)

    head.loss = MethodType(loss, head)  # type: ignore[assignment]
    head.best = MethodType(best, head)  # type: ignore[assignment]


def _factors(head: nn.Module, hidden: Tensor) -> tuple[list[tuple[Tensor, Tensor]], Tensor | None]:
    """Return the products whose sum is the logits, as pairs of factors, and the bias."""
    plain = cast(nn.Module, getattr(head, "base_layer", head))
    factors = [(hidden, cast(Tensor, plain.weight))]
    if plain is not head:
        factors.append(low_rank(head, hidden))
    return factors, getattr(plain, "bias", None)


def low_rank(layer: Any, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Return what PEFT's LoRA adds to the logits, as the factors of a product: (targets, rank), (vocabulary, rank)."""
    (name,) = layer.active_adapters
    down = layer.lora_A[name]
    inner = down(layer.lora_dropout[name](hidden.to(down.weight.dtype)))
    return inner * layer.scaling[name], layer.lora_B[name].weight


def target_loss(
    factors: Sequence[tuple[Tensor, Tensor]],
    bias: Tensor | None,
    labels: Tensor,
    spec: HeadSpec,
    sources: Sources | None = None,
) -> Any:
    """Return the sum of cross-entropy over the targets, float64 scalar.

    With `sources` a pair: that, and the sum of each source, float64 of shape (sources,), which has no gradient.
    Logits are the sum of `x @ weight.T` over `factors`, x: (targets, k), weight: (vocabulary, k); hidden states and the
    head's weight are the first. `bias`: (vocabulary,); `labels`: (targets,).
    Runs chunk by chunk. Where a gradient is needed it is computed in the forward, so that no logits are kept or
    computed twice. Source: the idea of fused linear cross-entropy (Liger Kernel, arXiv:2410.10989).
    """
    flat: list[Tensor] = []
    for x, weight in factors:
        flat += [x, weight]

    # Inside of a function of autograd, gradients are always disabled: it has to be passed in.
    grad = torch.is_grad_enabled()
    both = _TargetLoss.apply(labels, spec, grad, sources, bias, *flat)  # type: ignore[no-untyped-call]
    return both[0] if sources is None else both


class _TargetLoss(torch.autograd.Function):
    """`target_loss`, with its gradient computed in the forward."""

    @staticmethod
    def forward(
        ctx: Any,
        labels: Tensor,
        spec: HeadSpec,
        grad: bool,
        sources: Sources | None,
        bias: Tensor | None,
        *factors: Tensor,
    ) -> tuple[Tensor, Tensor | None]:
        hidden, weight = factors[:2]
        loss = torch.zeros((), dtype=torch.float64, device=hidden.device)
        of_sources = None if sources is None else loss.new_zeros(sources[1])
        grad_bias, grads = _empty_gradients(factors, [grad and needed for needed in ctx.needs_input_grad[4:]])

        rows = chunk_rows(weight.shape[1])
        for start in range(0, hidden.shape[0], rows):
            chunk = slice(start, start + rows)
            raw = nn.functional.linear(hidden[chunk], weight, bias)
            for x, w in _pairs(factors[2:]):
                raw = raw + nn.functional.linear(x[chunk], w)

            losses, grad_raw = _chunk(raw, labels[chunk], spec, grad)
            del raw  # no tensor of a chunk exists any more when the logits of the next one are computed
            loss += losses.sum(dtype=torch.float64)
            if sources is not None and of_sources is not None:
                of_sources.index_add_(0, sources[0][chunk], losses.double())

            if grad_raw is None:
                continue

            grad_logits = grad_raw.to(weight.dtype)
            for (x, w), (grad_x, grad_w) in zip(_pairs(factors), _pairs(grads), strict=True):
                if grad_x is not None:
                    torch.mm(grad_logits, w, out=grad_x[chunk])
                if grad_w is not None:
                    _add_product(grad_w, grad_logits, x[chunk])

            if grad_bias is not None:
                grad_bias += grad_raw.sum(0)

            del grad_raw, grad_logits

        ctx.save_for_backward(grad_bias, *grads)
        if of_sources is not None:
            ctx.mark_non_differentiable(of_sources)

        return loss, of_sources

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
        # In place: a second gradient of the weight would exist while all activations do. A second backward is refused.
        grads = [None if saved is None else saved.mul_(grad_loss.to(saved.dtype)) for saved in ctx.saved_tensors]
        return (None, None, None, None, *grads)


def _pairs(flat: Sequence[Any]) -> Iterator[tuple[Any, Any]]:
    """Yield the pairs of (x, weight), or of their gradients, from a flat sequence."""
    return zip(flat[::2], flat[1::2], strict=True)


def _empty_gradients(factors: Sequence[Tensor], wanted: Sequence[bool]) -> tuple[Tensor | None, list[Tensor | None]]:
    """Allocate the wanted gradients of the bias and of the factors. `wanted`: of the bias, then of each factor."""
    weight = factors[1]
    grad_bias = None
    if wanted[0]:
        wide = torch.promote_types(weight.dtype, torch.float32)
        grad_bias = torch.zeros(weight.shape[0], dtype=wide, device=weight.device)

    grads: list[Tensor | None] = []
    for i, factor in enumerate(factors):
        is_weight = i % 2 == 1
        if not wanted[1 + i]:
            grads.append(None)
        elif is_weight:  # adds up over chunks, in float32 or wider
            wide = torch.promote_types(factor.dtype, torch.float32)
            grads.append(torch.zeros(factor.shape, dtype=wide, device=factor.device))
        else:  # is written chunk by chunk
            grads.append(torch.empty_like(factor, memory_format=torch.contiguous_format))

    return grad_bias, grads


def _chunk(raw: Tensor, labels: Tensor, spec: HeadSpec, grad: bool) -> tuple[Tensor, Tensor | None]:
    """Return the loss of each row of a chunk, and the gradient of their sum by `raw`, in float32 or wider.

    `raw`: (rows, vocabulary).
    """
    logits = _logits(raw, spec)
    log_probs = torch.log_softmax(logits, dim=-1)
    index = labels[:, None]
    losses = -log_probs.gather(1, index)[:, 0]
    if not grad:
        return losses, None

    # Softmax minus the one-hot label, in the memory of the log-probabilities; then through soft-cap and scale.
    grad_logits = log_probs.exp_()
    grad_logits.scatter_add_(1, index, torch.full_like(index, -1, dtype=grad_logits.dtype))
    if spec.softcap is not None:
        grad_logits *= 1 - (logits / spec.softcap) ** 2

    if spec.scale != 1.0:
        grad_logits *= spec.scale

    return losses, grad_logits


def _logits(raw: Tensor, spec: HeadSpec) -> Tensor:
    """Return the logits in float32 or wider."""
    logits = raw.to(torch.promote_types(raw.dtype, torch.float32))
    if spec.scale != 1.0:
        logits = logits * spec.scale
    if spec.softcap is not None:
        logits = spec.softcap * torch.tanh(logits / spec.softcap)
    return logits


def _add_product(total: Tensor, grad_logits: Tensor, hidden: Tensor) -> None:
    """Add grad_logits.T @ hidden to `total`, in its dtype."""
    if total.dtype == hidden.dtype:
        total.addmm_(grad_logits.t(), hidden)
    else:
        total += grad_logits.t() @ hidden

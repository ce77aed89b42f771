"""Ulysses sequence parallelism: ranks hold a slice of the tokens, and for attention all tokens of a slice of the heads.

Two ranks, 4 heads and 6 tokens, for example. Outside of attention rank 0 holds tokens 0 1 2 of heads 0 1 2 3, rank 1
tokens 3 4 5 of the same heads. Each sends one part to the other, and rank 0 attends with tokens 0 to 5 of heads 0 1,
rank 1 with those of heads 2 3. The outputs are exchanged back. A number of heads that is not divisible is padded: 3
heads become 4, of which the last is zeros.

Source: DeepSpeed-Ulysses, arXiv:2309.14509.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class Ulysses:
    """The exchange of one sequence group, for `model.attention.register`. Exact for any number of heads.

    Key and value heads are repeated where there are too few of them, and heads of zeros are added where the group does
    not divide their number; the outputs of added heads are dropped again.
    """

    def __init__(self, group: dist.ProcessGroup, rank: int, size: int) -> None:
        self.group = group
        self.rank = rank
        self.size = size

    def to_heads(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Exchange tokens for heads: (1, heads, tokens / size, head dim) -> (1, heads / size, tokens, head dim).

        Heads are repeated and padded first.
        """
        repeats = kv_repeats(query.shape[1], key.shape[1], self.size)
        key = key.repeat_interleave(repeats, dim=1)
        value = value.repeat_interleave(repeats, dim=1)

        return (
            self._to_heads(pad_heads(query, self.size)),
            self._to_heads(pad_heads(key, self.size)),
            self._to_heads(pad_heads(value, self.size)),
        )

    def to_tokens(self, output: Tensor, num_heads: int) -> Tensor:
        """Exchange back: (1, padded heads / size, tokens, head dim) -> (1, num_heads, tokens / size, head dim)."""
        _, heads, tokens, width = output.shape
        parts = output[0].view(heads, self.size, tokens // self.size, width).transpose(0, 1)
        exchanged = _exchange(parts, self.group).reshape(1, self.size * heads, tokens // self.size, width)
        return exchanged[:, :num_heads]

    def my_heads(self, per_head: Tensor) -> Tensor:
        """Select, of one value per query head (heads,), those of the heads that this rank attends with."""
        padded = pad_heads(per_head.reshape(1, -1, 1, 1), self.size).reshape(-1)
        return padded.chunk(self.size)[self.rank]

    def _to_heads(self, states: Tensor) -> Tensor:
        _, heads, tokens, width = states.shape
        parts = states[0].view(self.size, heads // self.size, tokens, width)
        exchanged = _exchange(parts, self.group)
        return exchanged.transpose(0, 1).reshape(1, heads // self.size, self.size * tokens, width)


def kv_repeats(num_heads: int, num_kv_heads: int, size: int) -> int:
    """Return how often each key and value head is repeated, so that every rank has those of its own query heads.

    On each rank, the j-th of its key heads must serve the j-th equal share of its query heads. With 8 query heads, 2
    key heads and 4 ranks, for example, each rank has 2 query heads, and every key head is needed by 2 ranks: 2.
    """
    queries_per_kv = num_heads // num_kv_heads
    repeats = size // math.gcd(num_kv_heads, size)
    if num_heads % size == 0 and queries_per_kv % repeats == 0:
        return repeats
    return queries_per_kv  # a key head of its own for every query head always fits


def added_heads(num_heads: int, size: int) -> int:
    """Return the number of zero heads that are added so that `size` divides the number of heads."""
    return -num_heads % size


def pad_heads(states: Tensor, size: int) -> Tensor:
    """Return (1, heads, tokens, head dim) with zero heads at the end, contiguous."""
    extra = added_heads(states.shape[1], size)
    return torch.nn.functional.pad(states, (0, 0, 0, 0, 0, extra)).contiguous()


def _exchange(parts: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Send part i to rank i; part i of the result came from rank i. Differentiable."""
    exchanged: Tensor = _AllToAll.apply(parts, group)  # type: ignore[no-untyped-call]
    return exchanged


class _AllToAll(torch.autograd.Function):
    """The exchange is a permutation that is its own inverse, so gradients take the same way back."""

    @staticmethod
    def forward(ctx: Any, parts: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _all_to_all(parts, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _all_to_all(grad, ctx.group), None


def _all_to_all(parts: Tensor, group: dist.ProcessGroup) -> Tensor:
    # `empty_like` would keep the strides of a permuted gradient, and the parts would land in the wrong places.
    parts = parts.contiguous()
    received = torch.empty_like(parts, memory_format=torch.contiguous_format)
    dist.all_to_all_single(received, parts, group=group)
    return received

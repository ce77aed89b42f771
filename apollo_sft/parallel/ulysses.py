"""Ulysses sequence parallelism: ranks hold a slice of the tokens, and for attention all tokens of a slice of the heads.

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
    not divide their number; what belongs to those is dropped again.
    """

    def __init__(self, group: dist.ProcessGroup, rank: int, size: int) -> None:
        self.group = group
        self.rank = rank
        self.size = size

    def to_heads(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(1, heads, tokens / size, head dim) each -> (1, heads / size, tokens, head dim), heads padded first."""
        repeats = kv_repeats(query.shape[1], key.shape[1], self.size)
        key, value = (states.repeat_interleave(repeats, dim=1) for states in (key, value))
        q, k, v = (self._to_heads(pad_heads(states, self.size)) for states in (query, key, value))
        return q, k, v

    def to_tokens(self, output: Tensor, num_heads: int) -> Tensor:
        """(1, padded heads / size, tokens, head dim) -> (1, num_heads, tokens / size, head dim)."""
        _, heads, tokens, width = output.shape
        parts = output[0].view(heads, self.size, tokens // self.size, width).transpose(0, 1)
        exchanged = _exchange(parts, self.group).reshape(1, self.size * heads, tokens // self.size, width)
        return exchanged[:, :num_heads]

    def my_heads(self, per_head: Tensor) -> Tensor:
        """One value per query head, (heads,) -> those of the heads that this rank attends with."""
        padded = pad_heads(per_head.reshape(1, -1, 1, 1), self.size).reshape(-1)
        return padded.chunk(self.size)[self.rank]

    def _to_heads(self, states: Tensor) -> Tensor:
        _, heads, tokens, width = states.shape
        parts = states[0].view(self.size, heads // self.size, tokens, width)
        exchanged = _exchange(parts, self.group)
        return exchanged.transpose(0, 1).reshape(1, heads // self.size, self.size * tokens, width)


def kv_repeats(num_heads: int, num_kv_heads: int, size: int) -> int:
    """How often each key and value head is repeated, so that every rank holds those of its own query heads.

    Rank i must find that the j-th of its key heads serves the j-th equal share of its query heads.
    """
    queries_per_kv = num_heads // num_kv_heads
    repeats = size // math.gcd(num_kv_heads, size)
    if num_heads % size == 0 and queries_per_kv % repeats == 0:
        return repeats
    return queries_per_kv


def added_heads(num_heads: int, size: int) -> int:
    """Heads of zeros that are added so that `size` divides their number."""
    return -num_heads % size


def pad_heads(states: Tensor, size: int) -> Tensor:
    """(1, heads, tokens, head dim) with zero heads at the end, contiguous."""
    extra = added_heads(states.shape[1], size)
    return torch.nn.functional.pad(states, (0, 0, 0, 0, 0, extra)).contiguous()


def _exchange(parts: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Part i of every rank goes to rank i; the result holds what came from rank i as part i. Differentiable."""
    exchanged: Tensor = _AllToAll.apply(parts, group)  # type: ignore[no-untyped-call]
    return exchanged


class _AllToAll(torch.autograd.Function):
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

"""Bytes that one rank holds during a step, counted tensor by tensor: the same on every machine and every day."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@dataclass
class Peak:
    """Bytes that live now, and the most that ever did."""

    now: int = 0
    most: int = 0

    def add(self, num_bytes: int) -> None:
        self.now += num_bytes
        self.most = max(self.most, self.now)


@dataclass
class StepMemory:
    """`activations`: what the layers keep for the backward of one micro-batch. `logits`: tensors over the vocabulary.
    `all`: everything that the step allocates: these, gathered weights, gradients, the optimizer's state.
    """

    activations: Peak = field(default_factory=Peak)
    logits: Peak = field(default_factory=Peak)
    all: Peak = field(default_factory=Peak)


class _Allocations(TorchDispatchMode):
    """Sees every operation, so every new tensor; a storage counts until it is freed."""

    def __init__(self, memory: StepMemory, vocab_size: int) -> None:
        super().__init__()
        self.memory, self.vocab_size = memory, vocab_size
        self.seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {id(leaf.untyped_storage()) for leaf in _tensors((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        for tensor in _tensors(result):
            if id(tensor.untyped_storage()) not in before:
                self._count(tensor)
        return result

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if id(storage) in self.seen:
            return
        peaks = [self.memory.all]
        if tensor.ndim > 1 and tensor.shape[-1] == self.vocab_size:
            peaks.append(self.memory.logits)
        self.seen.add(id(storage))
        for peak in peaks:
            peak.add(storage.nbytes())
        weakref.finalize(storage, self._forget, id(storage), peaks, storage.nbytes())

    def _forget(self, key: int, peaks: list[Peak], num_bytes: int) -> None:
        self.seen.discard(key)
        for peak in peaks:
            peak.add(-num_bytes)


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if type(leaf) in (Tensor, nn.Parameter)]


@contextmanager
def counted(base_model: nn.Module, vocab_size: int) -> Iterator[StepMemory]:
    """Count the steps inside. `base_model`: the layers, whose activations are looked at. Checkpointing hides some."""
    memory = StepMemory()
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        root = tensor._base if tensor._base is not None else tensor
        if not isinstance(root, nn.Parameter):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)

    def enter(*_: Any) -> None:
        kept.clear()
        hooks.__enter__()

    def leave(*_: Any) -> None:
        hooks.__exit__(None, None, None)
        memory.activations.most = max(memory.activations.most, sum(kept.values()))

    handles = [base_model.register_forward_pre_hook(enter), base_model.register_forward_hook(leave)]
    with _Allocations(memory, vocab_size):
        yield memory
    for handle in handles:
        handle.remove()

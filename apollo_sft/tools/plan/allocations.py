"""Record every tensor that a piece of code allocates, with its birth and death: what lives at any moment, by kind.

Operations are recorded, not an allocator: the bytes are those of the storages, the same for real and fake tensors.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._guards import active_fake_mode
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

LAYERS = "layers"
HEAD = "head"
SHARDING = "sharding"
OPTIMIZER = "optimizer"
NOT_REAL = ""
MAKERS = {
    "torch.distributed.tensor._sharding_prop": NOT_REAL,
    "apollo_sft.model.head": HEAD,
    "torch.distributed.fsdp": SHARDING,
    "torch.distributed.utils": SHARDING,
    "torch.optim": OPTIMIZER,
    "torch.nn.utils": OPTIMIZER,
    "transformers": LAYERS,
    "peft": LAYERS,
    "torch.nn.modules": LAYERS,
    "apollo_sft.model": LAYERS,
}
"""The kind of an allocation, by the nearest module on the stack. Autograd's own operations have no such module, and
count as those of the layers. Tensors that DTensor makes to find out shapes do not exist when tensors are real."""
DEPTH = 25
"""Frames of the stack that are searched."""


@dataclass(slots=True)
class Allocation:
    """A storage, from its birth to its death."""

    num_bytes: int
    kind: str

    birth: int
    """The event of the timeline at which it was allocated."""

    death: int | None = None
    """The event at which it was freed; None while it lives."""


class Allocations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records allocations while it is entered. `now`: births and deaths so far."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = 0
        self.timeline: list[Allocation] = []
        self._living: dict[int, Allocation] = {}
        self._fake_mode: Any = None

    def __enter__(self) -> Allocations:
        self._fake_mode = active_fake_mode()
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # it turns into operations on its local tensor, which come here
        result = func(*args, **(kwargs or {}))
        if active_fake_mode() is self._fake_mode:  # else DTensor works out shapes
            for tensor in _tensors(result):
                self._see(tensor.untyped_storage())
        return result

    def add(self, tensors: Iterable[Tensor], kind: str) -> None:
        """Record tensors that exist already, or whose kind is known only now. Sharded ones count as their shard."""
        for tensor in tensors:
            local = tensor
            if isinstance(tensor, DTensor):
                local = tensor.to_local()
            self._see(local.untyped_storage(), kind)

    def resized(self, storage: torch.UntypedStorage) -> None:
        """Record that a storage has another size: sharding frees and fills memory under tensors that stay."""
        known = self._living.get(storage._cdata)
        if known is not None and known.num_bytes != storage.nbytes():
            self._end(known)
            self._begin(storage._cdata, storage.nbytes(), known.kind)

    def live_bytes(self, without: Collection[str] = ()) -> np.ndarray:
        """Return the bytes that live after each event, from 0 to `now`. `without`: kinds that do not count."""
        changes = np.zeros(self.now + 2, dtype=np.int64)
        for allocation in self.timeline:
            if allocation.kind not in without:
                changes[allocation.birth] += allocation.num_bytes
                death = allocation.death
                if death is None:
                    death = self.now + 1
                changes[death] -= allocation.num_bytes

        return np.cumsum(changes)[:-1]

    def at(self, moment: int) -> list[Allocation]:
        """Return the allocations that live at an event."""
        return [a for a in self.timeline if a.birth <= moment and (a.death is None or a.death > moment)]

    def _see(self, storage: torch.UntypedStorage, kind: str | None = None) -> None:
        known = self._living.get(storage._cdata)
        if known is None:
            found = kind or _maker()
            if found != NOT_REAL:
                self._begin(storage._cdata, storage.nbytes(), found)
                weakref.finalize(storage, self._forget, storage._cdata)
        elif kind is not None:
            known.kind = kind

    def _begin(self, key: int, num_bytes: int, kind: str) -> None:
        self.now += 1
        allocation = Allocation(num_bytes, kind, self.now)
        self._living[key] = allocation
        self.timeline.append(allocation)

    def _forget(self, key: int) -> None:
        self._end(self._living.pop(key))

    def _end(self, allocation: Allocation) -> None:
        self.now += 1
        allocation.death = self.now


def _tensors(tree: Any) -> Iterator[Tensor]:
    return (leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor) and leaf.device.type != "meta")


def _maker() -> str:
    """Return the kind of an allocation that is made now."""
    frame: FrameType | None = sys._getframe(3)  # the frames of this class come first
    for _ in range(DEPTH):
        if frame is None:
            break
        kind = _kind_of(frame.f_globals.get("__name__", ""))
        if kind is not None:
            return kind
        frame = frame.f_back

    return LAYERS


@cache
def _kind_of(module: str) -> str | None:
    return next((kind for name, kind in MAKERS.items() if module.startswith(name)), None)


@contextmanager
def recorded() -> Iterator[Allocations]:
    """Record allocations inside. A mode does not see the resizing of a storage: its method is wrapped meanwhile."""
    allocations = Allocations()
    plain = torch.UntypedStorage.resize_

    def resize(storage: torch.UntypedStorage, size: int) -> None:
        plain(storage, size)
        allocations.resized(storage)

    torch.UntypedStorage.resize_ = resize  # type: ignore[assignment,method-assign]
    try:
        with allocations:
            yield allocations
    finally:
        torch.UntypedStorage.resize_ = plain  # type: ignore[method-assign]

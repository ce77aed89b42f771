"""Muon for matrices that are sharded by rows: torch's own update, of complete matrices, whatever the layout.

A worked example, on 2 ranks of one mesh. Matrices A (4 x 3) and B (4 x 3) form a batch, since 2 ranks share a copy.

    rank 0 holds        A[0:2], B[0:2]
    rank 1 holds        A[2:4], B[2:4]
    all-to-all          rank 0 gets A complete, rank 1 gets B complete, in bfloat16
    each rank           computes the orthogonal factor of its own matrix, with torch's function
    all-to-all back     rank 0 gets rows 0:2 of both factors, rank 1 rows 2:4
    each rank           updates its rows of A and B

A rank sends as many values as it receives, and no rank computes what another one does. A last batch may have fewer
matrices than ranks: the ranks without one send their rows and compute nothing.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.optim._muon import DEFAULT_A, DEFAULT_B, DEFAULT_C, DEFAULT_NS_STEPS, EPS
from torch.optim._muon import _adjust_lr as adjusted_rate
from torch.optim._muon import _zeropower_via_newtonschulz as orthogonal

COEFFICIENTS = (DEFAULT_A, DEFAULT_B, DEFAULT_C)
MOMENTUM = 0.95


class Muon(Optimizer):
    """`torch.optim.Muon` with `adjust_lr_fn="match_rms_adamw"`, also of matrices that are sharded along their rows.

    Momentum is kept by shard. The orthogonal factor needs the complete matrix, and is computed in bfloat16, as torch
    does: of a batch of matrices each rank gets one, and sends the rows of its factor back. torch's class, given sharded
    matrices, adds up parts in bfloat16: another update for every number of ranks.
    Source: Muon is Scalable for LLM Training, arXiv:2502.16982.
    """

    def __init__(self, params: Iterable[dict[str, Any]], lr: float) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": 0.0, "momentum": MOMENTUM})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        assert closure is None, "a step of the training has its gradients already"
        for group in self.param_groups:
            # By size: the matrices of a batch take about the same time, and no rank waits for another.
            matrices = sorted((p for p in group["params"] if p.grad is not None), key=Tensor.numel, reverse=True)
            for batch in _batches(matrices):
                updates = [self._averaged(p, group["momentum"]) for p in batch]
                for p, factor in zip(batch, _factors(batch, updates), strict=True):
                    rows = _local(p)
                    rows.mul_(1 - group["lr"] * group["weight_decay"])
                    rows.add_(factor, alpha=-adjusted_rate(group["lr"], "match_rms_adamw", p.shape))
        return None

    def _averaged(self, parameter: nn.Parameter, momentum: float) -> Tensor:
        """Return the gradient of this rank's rows with Nesterov's momentum."""
        assert parameter.grad is not None
        state = self.state[parameter]
        grad = _local(parameter.grad)
        if not state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        average = _local(state["momentum_buffer"]).lerp_(grad, 1 - momentum)
        return grad.lerp(average, momentum)


class CombinedOptimizer(Optimizer):
    """Several optimizers as one: their groups, and one state."""

    def __init__(self, parts: Sequence[Optimizer]) -> None:
        super().__init__(list(itertools.chain.from_iterable(part.param_groups for part in parts)), {})
        self.parts = parts
        for part in parts:
            part.state = self.state

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        for part in self.parts:
            part.step(closure)
        return None


def _batches(matrices: Sequence[nn.Parameter]) -> Iterable[Sequence[nn.Parameter]]:
    """Return the matrices in batches of as many as ranks share a copy; single ones where they are not sharded."""
    size = 1
    if matrices and isinstance(matrices[0], DTensor):
        mesh = matrices[0].device_mesh
        size = mesh.size(mesh.ndim - 1)
    return (matrices[start : start + size] for start in range(0, len(matrices), size))


def _local(tensor: Tensor) -> Tensor:
    if isinstance(tensor, DTensor):
        return tensor.to_local()
    return tensor


def _factors(matrices: Sequence[nn.Parameter], updates: Sequence[Tensor]) -> list[Tensor]:
    """Return this rank's rows of the orthogonal factors, in bfloat16. `updates`: this rank's rows of each update."""
    first = matrices[0]
    if not isinstance(first, DTensor):
        return [orthogonal(update, COEFFICIENTS, DEFAULT_NS_STEPS, EPS) for update in updates]

    # The last dim of the mesh shards; the others hold copies.
    mesh = first.device_mesh
    group = mesh.get_group(mesh.ndim - 1)
    rank = mesh.get_local_rank(mesh.ndim - 1)
    size = mesh.size(mesh.ndim - 1)
    # Offloaded rows are on the CPU, where NCCL cannot send them from.
    device = torch.device("cpu")
    if mesh.device_type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device())

    mine = [update.numel() for update in updates] + [0] * (size - len(updates))
    sent = torch.cat([update.to(device, torch.bfloat16).reshape(-1) for update in updates])
    theirs = [0] * size
    if rank < len(matrices):
        rows, columns = matrices[rank].shape
        theirs = [len(part) * columns for part in torch.empty(rows, device="meta").chunk(size)]
        theirs += [0] * (size - len(theirs))

    complete = sent.new_empty(sum(theirs))
    dist.all_to_all_single(complete, sent, theirs, mine, group=group)
    if rank < len(matrices):
        complete = orthogonal(complete.view(matrices[rank].shape), COEFFICIENTS, DEFAULT_NS_STEPS, EPS).reshape(-1)
    # Back the same way: what was sent and received changes places, and `sent` is used again.
    dist.all_to_all_single(sent, complete.contiguous(), mine, theirs, group=group)
    parts = torch.split(sent, mine[: len(updates)])
    return [part.view_as(update).to(update.device) for part, update in zip(parts, updates, strict=True)]

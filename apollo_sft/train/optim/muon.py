"""Muon for matrices that ranks hold rows of: torch's own update, of whole matrices, whatever the layout."""

from __future__ import annotations

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

    Momentum is a shard's. The orthogonal factor needs the whole matrix, and is found in bfloat16, as torch does: of as
    many matrices as ranks share a copy, each rank gets one whole, in bfloat16, and gives the rows of its factor back.
    torch's class, given sharded matrices, adds up parts in bfloat16: another update for every number of ranks.
    Source: Muon is Scalable for LLM Training, arXiv:2502.16982.
    """

    def __init__(self, params: Iterable[dict[str, Any]], lr: float) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": 0.0, "momentum": MOMENTUM})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        assert closure is None, "a step of the training has its gradients already"
        for group in self.param_groups:
            # Those of a batch are of like size: the ranks are done at the same time.
            matrices = sorted((p for p in group["params"] if p.grad is not None), key=Tensor.numel, reverse=True)
            for some in _batches(matrices):
                updates = [self._averaged(p, group["momentum"]) for p in some]
                for p, factor in zip(some, _factors(some, updates), strict=True):
                    rows = _local(p)
                    rows.mul_(1 - group["lr"] * group["weight_decay"])
                    rows.add_(factor, alpha=-adjusted_rate(group["lr"], "match_rms_adamw", p.shape))
        return None

    def _averaged(self, parameter: nn.Parameter, momentum: float) -> Tensor:
        """Of this rank's rows: the gradient with Nesterov's momentum."""
        assert parameter.grad is not None
        state, grad = self.state[parameter], _local(parameter.grad)
        if not state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        average = _local(state["momentum_buffer"]).lerp_(grad, 1 - momentum)
        return grad.lerp(average, momentum)


class Together(Optimizer):
    """Several optimizers as one: their groups, and one state."""

    def __init__(self, parts: Sequence[Optimizer]) -> None:
        super().__init__([group for part in parts for group in part.param_groups], {})
        self.parts = parts
        for part in parts:
            part.state = self.state

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        for part in self.parts:
            part.step(closure)
        return None


def _batches(matrices: Sequence[nn.Parameter]) -> Iterable[Sequence[nn.Parameter]]:
    mesh = matrices[0].device_mesh if matrices and isinstance(matrices[0], DTensor) else None
    size = 1 if mesh is None else mesh.size(mesh.ndim - 1)
    return (matrices[start : start + size] for start in range(0, len(matrices), size))


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _factors(matrices: Sequence[nn.Parameter], updates: Sequence[Tensor]) -> list[Tensor]:
    """The orthogonal factors of whole updates, bfloat16. `updates` and what is returned: this rank's rows of each."""
    first = matrices[0]
    if not isinstance(first, DTensor):
        return [orthogonal(update, COEFFICIENTS, DEFAULT_NS_STEPS, EPS) for update in updates]
    mesh = first.device_mesh
    group, rank, size = mesh.get_group(mesh.ndim - 1), mesh.get_local_rank(mesh.ndim - 1), mesh.size(mesh.ndim - 1)
    on_cuda = mesh.device_type == "cuda"  # offloaded rows lie on the CPU, where NCCL does not reach
    device = torch.device("cuda", torch.cuda.current_device()) if on_cuda else torch.device("cpu")
    mine = [update.numel() for update in updates] + [0] * (size - len(updates))
    sent = torch.cat([update.to(device, torch.bfloat16).reshape(-1) for update in updates])
    theirs = [0] * size
    if rank < len(matrices):
        rows, columns = matrices[rank].shape
        theirs = [len(part) * columns for part in torch.empty(rows, device="meta").chunk(size)]
        theirs += [0] * (size - len(theirs))
    whole = sent.new_empty(sum(theirs))
    dist.all_to_all_single(whole, sent, theirs, mine, group=group)
    if rank < len(matrices):
        whole = orthogonal(whole.view(matrices[rank].shape), COEFFICIENTS, DEFAULT_NS_STEPS, EPS).reshape(-1)
    dist.all_to_all_single(sent, whole.contiguous(), mine, theirs, group=group)
    parts = torch.split(sent, mine[: len(updates)])
    return [part.view_as(update).to(update.device) for part, update in zip(parts, updates, strict=True)]

"""AdamW whose two averages take a byte for each value. Any device, any number of ranks: the same update."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

BLOCK = 256
"""Values of a row that share a scale. Ranks hold entire rows: no block is divided over two of them."""
CHUNK_ELEMENTS = 2**22
"""Values of a matrix that are in floating point at one time."""
EPS = 1e-8
SCALE = "_scale"


class AdamW8bit(Optimizer):
    """AdamW with its averages of gradient and squared gradient in 8 bits, of what has two dims and more.

    Each value is one of 256 (dynamic quantisation: seven decades, finer where they are large) times the largest of its
    block. It is updated in float32, or in float64 where the weights are. A square is never rounded to 0, so that no
    step is divided by `EPS` alone. Vectors keep floats.
    Source: 8-bit Optimizers via Block-wise Quantization, arXiv:2110.02861.
    """

    def __init__(self, params: Iterable[dict[str, Any]], lr: float, betas: tuple[float, float]) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        assert closure is None, "a step of the training has its gradients already"
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)
        return None

    def _update(self, parameter: nn.Parameter, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state |= quantised_zeros(parameter, "exp_avg") | quantised_zeros(parameter, "exp_avg_sq")
        state["step"] += 1

        weight = _rows(parameter)
        grad = _rows(gradient)
        averages = {name: _rows(value) for name, value in state.items() if name != "step"}
        wide = torch.promote_types(weight.dtype, torch.float32)
        levels = {n: _levels(n == "exp_avg").to(weight.device, wide) for n in ("exp_avg", "exp_avg_sq")}

        # Some rows at a time: the averages of a large matrix in floats would take more memory than 8 bits save.
        rows = max(1, CHUNK_ELEMENTS // max(1, weight.shape[1]))
        for start in range(0, weight.shape[0], rows):
            part = {name: value[start : start + rows] for name, value in averages.items()}
            first, second = (_read(part, name, levels[name]) for name in levels)
            new = weight[start : start + rows].to(wide)
            _adamw(new, grad[start : start + rows].to(wide), first, second, float(state["step"]), group)
            weight[start : start + rows] = new
            _write(part, "exp_avg", first, levels["exp_avg"])
            _write(part, "exp_avg_sq", second, levels["exp_avg_sq"])


def _adamw(weight: Tensor, grad: Tensor, first: Tensor, second: Tensor, step: float, group: dict[str, Any]) -> None:
    """Make one step, in place of `weight` and both averages. Source: arXiv:1711.05101, algorithm 2."""
    lr = group["lr"]
    beta1, beta2 = group["betas"]
    first.lerp_(grad, 1 - beta1)
    second.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    divisor = second.sqrt().div_(math.sqrt(1 - beta2**step)).add_(EPS)
    weight.mul_(1 - lr * group["weight_decay"]).addcdiv_(first, divisor, value=-lr / (1 - beta1**step))


def quantised_zeros(parameter: Tensor, name: str) -> dict[str, Tensor]:
    """Return the average `name` of a parameter before the first step, sharded as the parameter is.

    A matrix has codes, and a scale for each block; a vector has floats.
    """
    if parameter.dim() < 2:
        return {name: torch.zeros_like(parameter)}
    blocks = -(-math.prod(parameter.shape[1:]) // BLOCK)
    shape = (parameter.shape[0], blocks)
    if isinstance(parameter, DTensor):
        rows = len(parameter.to_local())
        scale: Tensor = DTensor.from_local(
            torch.zeros(rows, blocks, device=parameter.device_mesh.device_type),
            parameter.device_mesh,
            parameter.placements,
            run_check=False,
            shape=torch.Size(shape),
            stride=(blocks, 1),
        ).to(parameter.device)
    else:
        scale = torch.zeros(shape, device=parameter.device)
    return {name: torch.zeros_like(parameter, dtype=torch.uint8), name + SCALE: scale}


def _rows(tensor: Tensor) -> Tensor:
    """Return the rows of this rank as a matrix; a vector as one column."""
    local = tensor
    if isinstance(tensor, DTensor):
        local = tensor.to_local()
    return local.reshape(*(local.shape[:1] or (1,)), math.prod(local.shape[1:]))


def _levels(signed: bool) -> Tensor:
    """Return the value of each code, in their order: in each of seven decades twice as many as in the one below it."""
    finest = 2
    if signed:
        finest = 1  # half of the codes are for negative values
    levels = [1.0]
    for decade in range(7):
        number = finest * 2**decade
        levels += [10.0 ** (decade - 6) * (0.1 + 0.9 * (i + 0.5) / number) for i in range(number)]
    if signed:
        levels += [0.0, *(-level for level in levels[1:])]
    return torch.tensor(sorted(levels), dtype=torch.float64)


def _read(part: dict[str, Tensor], name: str, levels: Tensor) -> Tensor:
    """Return an average of shape (rows, columns) in the dtype of `levels`."""
    if name + SCALE not in part:
        return part[name].to(levels.dtype, copy=True)
    scale = part[name + SCALE].to(levels.dtype).repeat_interleave(BLOCK, dim=1)
    return levels[part[name].int()] * scale[:, : part[name].shape[1]]


def _write(part: dict[str, Tensor], name: str, values: Tensor, levels: Tensor) -> None:
    if name + SCALE not in part:
        part[name].copy_(values)
        return
    rows, columns = values.shape
    scale = part[name + SCALE]
    blocks = nn.functional.pad(values, (0, scale.shape[1] * BLOCK - columns)).view(rows, scale.shape[1], BLOCK)
    scale.copy_(blocks.abs().amax(dim=-1))
    blocks = blocks / scale.to(levels.dtype).clamp(min=torch.finfo(torch.float32).tiny)[..., None]
    codes = torch.bucketize(blocks, (levels[1:] + levels[:-1]) / 2, out_int32=True)
    part[name].copy_(codes.view(rows, -1)[:, :columns])

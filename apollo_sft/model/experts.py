"""LoRA on fused expert tensors: two small products beside the product with each expert's weight.

PEFT keeps such adapters in a `ParamWrapper`, which adds B A to the fused tensor before it is used. That sum is as large
as all experts of a layer, and it stays until the backward. Here adapters run as those of a linear module do; names,
shapes and files are PEFT's.

Rows are sorted by expert, so that each expert has one contiguous range of them. Three tokens with two experts each, for
example, chosen = [[1, 0], [1, 2], [0, 1]]: the six pairs sorted by expert are 0 0 1 1 1 2, `ends` is [2, 5, 6], and
rows 2 to 4 are multiplied with the weight of expert 1. Afterwards the rows are put back in order, scaled by the share
of their expert, and the two rows of a token are added.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import MethodType
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate

from apollo_sft.errors import ConfigError

UP = "gate_up_proj"
DOWN = "down_proj"
ALIGNMENT_BYTES = 16
"""Grouped products on CUDA need rows of a multiple of this size."""


def are_experts(module: Any) -> bool:
    """Return whether a module is experts that `_forward` computes: gated, and without a norm after them."""
    # transformers sets these on modules whose experts it can compute in more than one way.
    return getattr(module, "has_gate", False) and not getattr(module, "has_post_expert_norm", True)


def is_wrapper(module: Any) -> bool:
    """Return whether a module is PEFT's `ParamWrapper`. Importing PEFT for that would take seconds."""
    return hasattr(module, "lora_A") and hasattr(module, "parameter_name")


def wrapped(causal_lm: Any) -> list[tuple[str, Any]]:
    """List the modules with adapters on their tensors: name, and the outermost wrapper of the module."""
    found = [(name, module) for name, module in causal_lm.named_modules() if is_wrapper(module)]
    inner = {id(module.base_layer) for _, module in found}
    return [(name, module) for name, module in found if id(module) not in inner]


def wrappers(outermost: Any) -> Iterator[Any]:
    """Yield the wrapper of each adapted tensor of one module: they are nested."""
    while is_wrapper(outermost):
        yield outermost
        outermost = outermost.base_layer


def attach(causal_lm: Any) -> None:
    """Make adapted experts compute as `_forward` does. Raises: ConfigError for adapted tensors that are no experts'."""
    for name, outermost in wrapped(causal_lm):
        names = {wrapper.parameter_name for wrapper in wrappers(outermost)}
        experts = outermost.get_base_layer()
        if not are_experts(experts) or names - {UP, DOWN}:
            raise ConfigError(
                "model.target_modules takes in a tensor that is not one of gated experts",
                found=f"{name}, a {type(experts).__name__}: {', '.join(sorted(names))}",
                fix="leave it out; a router is trained whole by model.modules_to_save",
            )

        outermost.forward = MethodType(_forward, outermost)


def _forward(self: Any, hidden: Tensor, chosen: Tensor, shares: Tensor) -> Tensor:
    """Compute the experts with their adapters.

    `hidden`: (tokens, hidden size); `chosen`, `shares`: (tokens, experts per token).
    Source: transformers' `grouped_mm_experts_forward`, whose order of sums this keeps.
    """
    experts = self.get_base_layer()
    each = chosen.shape[1]
    ids, order = torch.sort(chosen.reshape(-1), stable=True)
    ends = torch.searchsorted(ids, torch.arange(self.num_experts, device=ids.device), right=True).int()
    adapters = {wrapper.parameter_name: wrapper for wrapper in wrappers(self)}

    def project(rows: Tensor, name: str) -> Tensor:
        weight = getattr(experts, name)
        made = _product(rows, weight if experts.is_transposed else weight.transpose(1, 2), ends)
        if experts.has_bias:
            made = made + getattr(experts, f"{name}_bias")[ids]

        if name in adapters:
            made = made + _low_rank(adapters[name], rows, ends).to(made.dtype)
        return made

    # `order` counts pairs of a token and an expert: pair i belongs to token i // each.
    rows = project(experts._apply_gate(project(hidden[order // each], UP)), DOWN)
    rows = (rows * shares.reshape(-1)[order, None])[torch.argsort(order)]
    return rows.view(len(hidden), each, -1).sum(1).to(hidden.dtype)


def _low_rank(wrapper: Any, rows: Tensor, ends: Tensor) -> Tensor:
    """Return what the adapter of one tensor adds to the product with it."""
    down, up = _factors(wrapper)

    # The rank is padded with zeros, which change nothing.
    short = -down.shape[1] * down.element_size() % ALIGNMENT_BYTES // down.element_size()
    if short:
        down = nn.functional.pad(down, (0, 0, 0, short))
        up = nn.functional.pad(up, (0, short))

    inner = _product(rows, down.transpose(1, 2), ends)
    return _product(inner * _scaling(wrapper), up.transpose(1, 2), ends)


def _factors(wrapper: Any) -> tuple[Tensor, Tensor]:
    """Return A, (experts, rank, in features), and B, (experts, out features, rank), from PEFT's two matrices."""
    (adapter,) = wrapper.active_adapters
    down = _full(wrapper.lora_A[adapter].weight)
    up = _full(wrapper.lora_B[adapter].weight)

    # PEFT's A is (experts * rank, in), its B is (out, rank * experts), the expert being the fastest index there.
    down = down.reshape(wrapper.num_experts, -1, down.shape[1])
    return down, up.reshape(up.shape[0], -1, wrapper.num_experts).permute(2, 0, 1).contiguous()


def _full(weight: Tensor) -> Tensor:
    return weight.full_tensor() if isinstance(weight, DTensor) else weight


def _scaling(wrapper: Any) -> float:
    (adapter,) = wrapper.active_adapters
    return float(wrapper.scaling[adapter])


def _product(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Multiply the rows from `ends[e - 1]` to `ends[e]` with the weight of expert e.

    `rows`: (rows, k), sorted by expert; `weight`: (experts, k, n); `ends`: int32, (experts,).
    """
    from transformers.integrations import moe

    if weight.dtype == torch.float64:  # grouped products do not support it
        return cast(Tensor, torch.ops.transformers.grouped_mm_fallback(rows.to(weight.dtype), weight, ends))
    return cast(Tensor, moe._grouped_mm(rows, weight, ends))


@torch.no_grad()
def merge(causal_lm: Any, rounded: Callable[[Tensor, torch.dtype, str], Tensor]) -> None:
    """Merge as `lora.merge` does, with its `cast`. A rank computes what is added for its own experts only."""
    for name, outermost in wrapped(causal_lm):
        experts = outermost.get_base_layer()
        for wrapper in wrappers(outermost):
            weight = wrapper.get_param()
            down, up = _factors(wrapper)
            added = torch.bmm(_as(weight, up * _scaling(wrapper)), _as(weight, down))
            if experts.is_transposed:
                added = added.transpose(1, 2)

            merged = weight.to(torch.promote_types(weight.dtype, torch.float32)) + added
            merged = rounded(merged, weight.dtype, f"{name}.{wrapper.parameter_name}")
            setattr(experts, wrapper.parameter_name, nn.Parameter(merged, requires_grad=False))

        causal_lm.set_submodule(name, experts)


def _as(weight: Tensor, factor: Tensor) -> Tensor:
    """Return `factor`, which every rank has in full, sharded along its experts as `weight` is."""
    if not isinstance(weight, DTensor):
        return factor
    mesh = weight.device_mesh
    return DTensor.from_local(factor, mesh, [Replicate()] * mesh.ndim).redistribute(placements=weight.placements)

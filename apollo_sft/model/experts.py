"""LoRA on experts that are held in one tensor: beside the product with each expert's weight, two small ones.

PEFT keeps such adapters in a `ParamWrapper`, which adds B A to the whole tensor before it is used. That sum is as large
as all experts of a layer, and it stays until the backward. Here adapters run as those of a linear module do; names,
shapes and files are PEFT's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import MethodType
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate

from apollo_sft.errors import ConfigError

UP, DOWN = "gate_up_proj", "down_proj"
ALIGNMENT_BYTES = 16
"""Grouped products on CUDA want rows of a multiple of it."""


def are_experts(module: Any) -> bool:
    """Whether transformers can compute it in more than one way, and so says how; gated, and without a norm behind."""
    return getattr(module, "has_gate", False) and not getattr(module, "has_post_expert_norm", True)


def is_wrapper(module: Any) -> bool:
    """Whether it is PEFT's `ParamWrapper`. PEFT is not imported for it, which takes seconds."""
    return hasattr(module, "lora_A") and hasattr(module, "parameter_name")


def wrapped(causal_lm: Any) -> list[tuple[str, Any]]:
    """Names and wrappers of modules whose tensors have adapters; of wrappers of the same module the outermost."""
    found = [(name, module) for name, module in causal_lm.named_modules() if is_wrapper(module)]
    inner = {id(module.base_layer) for _, module in found}
    return [(name, module) for name, module in found if id(module) not in inner]


def wrappers(outermost: Any) -> Iterator[Any]:
    """One of each adapted tensor."""
    while is_wrapper(outermost):
        yield outermost
        outermost = outermost.base_layer


def attach(causal_lm: Any) -> None:
    """Let adapted experts compute as `_forward` does. Raises: ConfigError for adapted tensors that are no experts'."""
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
    """`hidden`: (tokens, hidden size); `chosen`, `shares`: (tokens, experts a token).

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
        return made + _low_rank(adapters[name], rows, ends).to(made.dtype) if name in adapters else made

    rows = project(experts._apply_gate(project(hidden[order // each], UP)), DOWN)
    rows = (rows * shares.reshape(-1)[order, None])[torch.argsort(order)]
    return rows.view(len(hidden), each, -1).sum(1).to(hidden.dtype)


def _low_rank(wrapper: Any, rows: Tensor, ends: Tensor) -> Tensor:
    """What the adapter of one tensor adds to the product with it."""
    down, up = _factors(wrapper)
    short = -down.shape[1] * down.element_size() % ALIGNMENT_BYTES // down.element_size()
    if short:  # zeros change nothing
        down, up = nn.functional.pad(down, (0, 0, 0, short)), nn.functional.pad(up, (0, short))
    inner = _product(rows, down.transpose(1, 2), ends)
    return _product(inner * _scaling(wrapper), up.transpose(1, 2), ends)


def _factors(wrapper: Any) -> tuple[Tensor, Tensor]:
    """A, (experts, rank, in features), and B, (experts, out features, rank), as PEFT lays them out in two matrices."""
    (adapter,) = wrapper.active_adapters
    weights = (part[adapter].weight for part in (wrapper.lora_A, wrapper.lora_B))
    down, up = (weight.full_tensor() if isinstance(weight, DTensor) else weight for weight in weights)
    down = down.reshape(wrapper.num_experts, -1, down.shape[1])
    return down, up.reshape(up.shape[0], -1, wrapper.num_experts).permute(2, 0, 1).contiguous()


def _scaling(wrapper: Any) -> float:
    (adapter,) = wrapper.active_adapters
    return float(wrapper.scaling[adapter])


def _product(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Rows up to `ends[e]`, int32, with expert e. `rows`: (rows, k), by expert; `weight`: (experts, k, n)."""
    from transformers.integrations import moe

    if weight.dtype == torch.float64:  # which grouped products do not know
        return cast(Tensor, torch.ops.transformers.grouped_mm_fallback(rows.to(weight.dtype), weight, ends))
    return cast(Tensor, moe._grouped_mm(rows, weight, ends))


@torch.no_grad()
def merge(causal_lm: Any, rounded: Callable[[Tensor, torch.dtype, str], Tensor]) -> None:
    """`lora.merge` of experts, with its `cast`: a rank forms what it adds for its own experts alone."""
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
    """`factor`, which every rank has, cut along its experts as `weight` is."""
    if not isinstance(weight, DTensor):
        return factor
    mesh = weight.device_mesh
    return DTensor.from_local(factor, mesh, [Replicate()] * mesh.ndim).redistribute(placements=weight.placements)

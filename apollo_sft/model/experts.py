"""LoRA on experts that are held in one tensor: beside the product with each expert's weight, two small ones.

PEFT keeps such adapters in a `ParamWrapper`, which adds B A to the whole tensor before it is used. That sum is as large
as all experts of a layer, and it stays until the backward. Here adapters run as those of a linear module do; names,
shapes and files are PEFT's.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from types import MethodType
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate

from apollo_sft.errors import ConfigError

UP, DOWN = "gate_up_proj", "down_proj"
ROUTER = "gate.weight"
"""What PEFT calls the weight of a router where `all-linear` takes it in."""
ALIGNMENT_BYTES = 16
"""Grouped products on CUDA want rows of a multiple of it."""


def name_targets(config: Any, causal_lm: Any) -> None:
    """Write PEFT's names of experts in one tensor into its config, in place. `all-linear` adds those of architectures
    that PEFT does not know, and takes tensors of routers out.

    Raises: ConfigError for what PEFT's adapters of tensors cannot do.
    """
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    everything = config.target_modules == "all-linear"
    convert_peft_config_for_transformers(config, causal_lm, None)
    names = set(config.target_parameters or ())
    if everything:
        names = names - {ROUTER} | _names_of_the_rest(config, causal_lm, names)
    config.target_parameters = names or None
    for wrong, key in ((config.lora_dropout, "lora_dropout"), (config.use_dora, "use_dora")):
        if wrong and names:
            raise ConfigError(
                f"model.{key}: adapters of experts that are held in one tensor know none",
                found=f"{', '.join(sorted(names))} among what is adapted",
                fix=f"leave model.{key} out, or name other modules: model.target_modules=[q_proj,k_proj,v_proj,o_proj]",
            )


def asked_for(targets: Any, causal_lm: Any) -> set[str]:
    """Linear modules outside of the head that `targets` names, of a model without adapters; of `all-linear` experts in
    one tensor, too. Raises: re.error."""
    head = causal_lm.get_output_embeddings()
    linear = {name for name, m in causal_lm.named_modules() if isinstance(m, nn.Linear) and m is not head}
    if targets == "all-linear":
        plain = (m for m in causal_lm.named_modules() if not isinstance(m[1], nn.modules.conv._ConvNd))
        of_each = ((f"{name}.{n}", p) for name, m in plain for n, p in m.named_parameters(recurse=False))
        return linear | {name for name, parameter in of_each if parameter.ndim == 3 and not name.endswith("_bias")}
    if isinstance(targets, str):
        return {name for name in linear if re.fullmatch(targets, name)}
    return {name for name in linear if any(f".{name}".endswith(f".{target}") for target in targets)}


def check_names(targets: Any, missed: set[str], unasked: set[str]) -> None:
    """What became of `targets` beside adapted experts. PEFT takes names for last names where it knows the architecture.

    Raises: ConfigError when others than those that are named in full are adapted.
    """
    in_full = targets != "all-linear" and (isinstance(targets, str) or any("." in target for target in targets))
    if in_full and (missed or unasked):
        raise ConfigError(
            "model.target_modules: beside experts in one tensor, PEFT takes modules of this architecture by last names",
            found="; ".join(
                f"{len(names)} {what}, such as {min(names)}"
                for what, names in (("named and not adapted", missed), ("adapted and not named", unasked))
                if names
            ),
            fix="last names, model.target_modules=[q_proj,v_proj], and experts by model.target_parameters",
        )


def _names_of_the_rest(config: Any, causal_lm: Any, known: set[str]) -> set[str]:
    """Experts of architectures that PEFT does not know, as it names those that it knows: gate and up, which lie in one
    tensor, with the rank and the alpha of two, in place."""
    found: set[str] = set()
    for name, module in causal_lm.named_modules():
        if _are_experts(module) and not any(f"{name}.{UP}".endswith(f".{target}") for target in known):
            found |= {f"{name.rpartition('.')[2]}.{tensor}" for tensor in (UP, DOWN)}
            config.rank_pattern[rf".*\.{UP}"], config.alpha_pattern[rf".*\.{UP}"] = 2 * config.r, 2 * config.lora_alpha
    return found


def _are_experts(module: Any) -> bool:
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
        if not _are_experts(experts) or names - {UP, DOWN}:
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

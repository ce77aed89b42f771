"""Sharding by torch's `fully_shard`, and filling the shards from the one rank that has read the weights."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

from apollo_sft.errors import ConfigError

M = TypeVar("M", bound=nn.Module)

MIXES_DTYPES = True
"""Parameters of different dtypes may be in one group."""


@dataclass(frozen=True, slots=True)
class ShardSpec:
    """How a model is sharded."""

    layer_names: frozenset[str]
    """Class names of the blocks that are gathered one at a time."""
    compute_dtype: torch.dtype
    reduce_dtype: torch.dtype
    reshard_after_forward: bool
    min_num_params: int = 0
    """Above 0, every module of at least that many parameters is a block, and `layer_names` has no effect."""
    offload: bool = False
    """Keep parameters, gradients and optimizer state on the CPU."""


def check(shard_size: int, compute_dtype: torch.dtype, reduces_once: bool) -> None:
    """Refuse nothing: FSDP2 computes every combination exactly. `shard_size`: ranks that share one copy, or -1."""
    del shard_size, compute_dtype, reduces_once


def shard(model: M, mesh: DeviceMesh, spec: ShardSpec, head: nn.Module | None) -> M:
    """Shard every block that the spec chooses, the untied `head` as a group of its own, the rest as the root; in place.

    `head` is None when it shares its weight with the embedding: it then belongs to the root.
    Raises: ConfigError when the spec chooses no block.
    """
    offload = OffloadPolicy()
    if spec.offload:
        offload = CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda")

    group = partial(
        fully_shard,
        mesh=mesh,
        mp_policy=MixedPrecisionPolicy(param_dtype=spec.compute_dtype, reduce_dtype=spec.reduce_dtype),
        offload_policy=offload,
    )

    if head is not None:
        # Kept after the forward: its gradient is formed there, so a second gathering would serve nothing.
        group(head, reshard_after_forward=False)
        register_fsdp_forward_method(head, "loss")
        register_fsdp_forward_method(head, "best")

    # From the inside out: the root takes every parameter that no group before it has taken.
    for block in blocks(model, spec, head):
        group(block, reshard_after_forward=spec.reshard_after_forward)

    group(model, reshard_after_forward=False)
    return model


def blocks(model: nn.Module, spec: ShardSpec, head: nn.Module | None) -> list[nn.Module]:
    """Return the modules that are gathered one at a time. Raises: ConfigError when there is none."""
    if spec.min_num_params:
        return _large_modules(model, spec.min_num_params, head)

    blocks = [module for module in model.modules() if type(module).__name__ in spec.layer_names]
    if not blocks:
        raise ConfigError(
            "model.fsdp_config.wrap_policy.transformer_layer_cls_to_wrap names no module of this model",
            found=", ".join(sorted(spec.layer_names)) or "nothing",
            expected=f"one of {', '.join(sorted({type(module).__name__ for module in model.modules()}))}",
        )
    return blocks


def _large_modules(model: nn.Module, min_num_params: int, head: nn.Module | None) -> list[nn.Module]:
    """Choose, from the leaves up, every module with that many parameters outside of modules chosen before it.

    As FSDP1's size-based policy does. A block of 5 million parameters, for example, with two linear layers of 2 million
    and norms of 1 million in all: with a limit of 2 million both layers are chosen, and the norms are left to the root;
    with a limit of 3 million the block is chosen as a whole.
    """
    owners: Counter[int] = Counter()
    for module in model.modules():
        owners.update(id(parameter) for parameter in module.parameters(recurse=False))

    chosen: list[nn.Module] = []

    def visit(module: nn.Module) -> int:
        if module is head:
            return 0

        own = [p for p in module.parameters(recurse=False) if owners[id(p)] == 1]
        left = sum(p.numel() for p in own) + sum(visit(child) for child in module.children())

        # A container is not called, so it cannot gather; a weight that two modules share is left to the root.
        takes = left >= min_num_params and module is not model
        if not takes or isinstance(module, nn.ModuleList | nn.ModuleDict) or _holds_shared(module, owners):
            return left

        chosen.append(module)
        return 0

    visit(model)
    return chosen


def _holds_shared(module: nn.Module, owners: Counter[int]) -> bool:
    return any(owners[id(parameter)] > 1 for parameter in module.parameters())


def fill(model: nn.Module, source: nn.Module | None, device: torch.device, offload: bool = False) -> None:
    """Give a sharded meta model its weights and buffers from rank 0, whose `source` holds them on the CPU.

    Tensors travel one by one, so that no other rank ever holds the whole model. With `offload` the shards stay on the
    CPU; buffers are always on `device`.
    """
    model.to_empty(device=torch.device("cpu") if offload else device)
    weights = {} if source is None else source.state_dict()
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, cpu_offload=offload)
    set_model_state_dict(model, weights, options=options)
    fill_buffers(model, source, device)


def _unchanged(name: str) -> str:
    return name


def fill_buffers(
    model: nn.Module, source: nn.Module | None, device: torch.device, plain: Callable[[str], str] = _unchanged
) -> None:
    """Give the model its buffers from rank 0. `plain` makes of a name in `model` the one in `source`."""
    full = dict(source.named_buffers()) if source is not None else {}
    for module_name, module in model.named_modules():
        for name, empty in module.named_buffers(recurse=False):
            buffer = torch.empty_like(empty, device=device)
            if source is not None:
                buffer.copy_(full[plain(f"{module_name}.{name}")])

            # The order of modules is the same on all ranks, so the broadcasts match.
            dist.broadcast(buffer, src=0)
            setattr(module, name, buffer)


def reduce_gradients(model: nn.Module, wanted: bool) -> None:
    """Set whether the next backward reduces gradients over ranks. Without it, full ones add up on every rank."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(wanted)
        model.set_is_last_backward(wanted)


def grad_norm(model: nn.Module, parameters: Iterable[nn.Parameter]) -> Tensor:
    """Return the L2 norm, over all ranks, of the gradients that the parameters have."""
    del model
    norm = get_total_norm([p.grad for p in parameters if p.grad is not None], foreach=True)
    whole: Tensor = norm.full_tensor() if isinstance(norm, DTensor) else norm
    return whole


def num_dims(model: nn.Module, parameter: nn.Parameter) -> int:
    """Return the number of dims of the full parameter."""
    del model
    return parameter.ndim


def reshard(model: nn.Module) -> None:
    """Free gathered weights: a forward without a backward leaves some.

    The modules would show those, in the compute dtype, in the place of the shards that the optimizer updates.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def as_row_sharded(model: M, gradients: bool = False) -> M:
    """Return the model with parameters, and gradients, as DTensors sharded along dim 0, to be saved or exported."""
    del gradients
    return model


def outline(model: M) -> M:
    """Return the model for its names, shapes and buffers; no collective."""
    return model


def held(model: nn.Module) -> dict[str, tuple[int, Tensor]]:
    """Return this rank's part of each parameter, by name: the flat position of its first value, and its values."""
    found = {}
    for name, parameter in model.named_parameters():
        assert isinstance(parameter, DTensor)
        local = parameter.to_local()
        _, offset = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
        found[name] = (offset[0] * math.prod(parameter.shape[1:]), local)  # it is sharded along dim 0
    return found


def optimizer_as_row_sharded(model: nn.Module, rows: nn.Module, optimizer: Optimizer) -> Optimizer:
    """Return the optimizer with its state in the same form, for the parameters of `as_row_sharded`."""
    del model, rows
    return optimizer


def load_row_sharded(model: nn.Module, optimizer: Optimizer, rows: nn.Module, rows_optimizer: Optimizer) -> None:
    """Do nothing: the tensors of `rows` and `rows_optimizer` are those of the model and of its optimizer."""

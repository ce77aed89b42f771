"""Sharding by torch's `fully_shard`, and filling the shards from the one rank that has read the weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

from apollo_sft.errors import ConfigError


@dataclass(frozen=True, slots=True)
class ShardSpec:
    """`layer_names`: class names of the blocks that are gathered one at a time."""

    layer_names: frozenset[str]
    compute_dtype: torch.dtype
    reduce_dtype: torch.dtype
    reshard_after_forward: bool


def shard(model: nn.Module, mesh: DeviceMesh, spec: ShardSpec, head: nn.Module | None) -> None:
    """Shard every block named in the spec, the untied `head` as a group of its own, and the rest as the root.

    `head` is None when it shares its weight with the embedding: it then belongs to the root.
    Raises: ConfigError when the model has no block of the named classes.
    """
    policy = MixedPrecisionPolicy(param_dtype=spec.compute_dtype, reduce_dtype=spec.reduce_dtype)
    blocks = [module for module in model.modules() if type(module).__name__ in spec.layer_names]
    if not blocks:
        raise ConfigError(
            "model.fsdp_config.wrap_policy.transformer_layer_cls_to_wrap names no module of this model",
            found=", ".join(sorted(spec.layer_names)) or "nothing",
            expected=f"one of {', '.join(sorted({type(module).__name__ for module in model.modules()}))}",
        )
    for block in blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=spec.reshard_after_forward)
    if head is not None:
        # Kept after the forward: its gradient is formed there, so a second gathering would serve nothing.
        fully_shard(head, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
        register_fsdp_forward_method(head, "loss")
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=False)


def fill(model: nn.Module, source: nn.Module | None, device: torch.device) -> None:
    """Give a sharded meta model its weights and buffers from rank 0, whose `source` holds them on the CPU.

    Tensors travel one by one, so that no other rank ever holds the whole model.
    """
    model.to_empty(device=device)
    weights = {} if source is None else source.state_dict()
    set_model_state_dict(model, weights, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True))
    full = dict(source.named_buffers()) if source is not None else {}
    for name, buffer in model.named_buffers():
        if source is not None:
            buffer.copy_(full[name])
        dist.broadcast(buffer, src=0)


def largest_over_ranks(values: Tensor) -> Tensor:
    """Element-wise maximum over all ranks, in place; the identity without a process group."""
    if dist.is_initialized():
        dist.all_reduce(values, op=dist.ReduceOp.MAX)
    return values


def sum_over_ranks(values: Tensor) -> Tensor:
    """Element-wise sum over all ranks, in place; the identity without a process group."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values

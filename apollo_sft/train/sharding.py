"""How a model is sharded, as the config says: activation checkpointing, the groups of layers, their precision."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from apollo_sft.config.schema import ModelConfig
from apollo_sft.errors import ConfigError
from apollo_sft.model.sft_model import SftModel, enable_checkpointing
from apollo_sft.parallel.fsdp2 import ShardSpec
from apollo_sft.parallel.launch import World
from apollo_sft.parallel.mesh import Mesh
from apollo_sft.train.precision import Precision, resolve_precision
from apollo_sft.train.strategy import strategy_name, strategy_named

if TYPE_CHECKING:
    from apollo_sft.parallel.ulysses import Ulysses


def shard_model(config: ModelConfig, model: SftModel, world: World, mesh: Mesh) -> SftModel:
    """Enable checkpointing, and shard the model over `mesh.shard` when there is one: on meta then, and not filled yet.

    Raises: ConfigError when the modules to shard are not there.
    """
    if config.use_liger and world.device.type == "cuda":  # not where a step is only counted
        from apollo_sft.model import liger

        liger.apply(model.causal_lm)
    _enable_checkpointing(model, config)
    if mesh.shard is not None:
        precision = resolve_precision(config, world.device.type == "cuda")
        name = strategy_name(config, world)
        spec = _shard_spec(model, config, precision)
        model = strategy_named(name).shard(model, mesh.shard, spec, _own_head(model))
        model.strategy = name
    model.reduces_once = config.fsdp_config.use_no_sync_for_gradient_accumulation
    return model


def head_exchange(mesh: Mesh) -> Ulysses | None:
    """Return what attention does between ranks that share a sequence; None where each rank has its own."""
    if mesh.sp_group is None:
        return None
    from apollo_sft.parallel.ulysses import Ulysses

    return Ulysses(mesh.sp_group, mesh.sp_rank, mesh.sp_size)


def offloads(config: ModelConfig) -> bool:
    """Return whether weights, gradients and optimizer state are kept on the CPU."""
    return config.fsdp_config.cpu_offload or config.fsdp_config.offload_params


def needs_group(model: ModelConfig, on_cuda: bool) -> bool:
    """Return whether a single process must shard too: the sharding itself mixes precisions and offloads."""
    return resolve_precision(model, on_cuda).mixed or offloads(model)


def _enable_checkpointing(model: SftModel, config: ModelConfig) -> None:
    if config.enable_gradient_checkpointing:
        enable_checkpointing(model.causal_lm, selective=config.gradient_checkpointing_policy == "selective")


def _shard_spec(model: SftModel, config: ModelConfig, precision: Precision) -> ShardSpec:
    wanted = config.fsdp_config.wrap_policy.transformer_layer_cls_to_wrap
    names = wanted or tuple(model.causal_lm._no_split_modules or ())
    if not names:
        raise ConfigError(
            f"{type(model.causal_lm).__name__} does not say which of its modules are its layers",
            fix="model.fsdp_config.wrap_policy.transformer_layer_cls_to_wrap=[ClassName]",
        )
    return ShardSpec(
        layer_names=frozenset(names),
        compute_dtype=precision.compute,
        reduce_dtype=precision.reduce,
        reshard_after_forward=config.fsdp_config.reshard_after_forward,
        min_num_params=config.fsdp_config.wrap_policy.min_num_params,
        offload=offloads(config),
    )


def _own_head(model: SftModel) -> nn.Module | None:
    """Return the head when its weight is its own, None when it is the embedding's."""
    head: nn.Module = model.causal_lm.get_output_embeddings()
    if head.weight is model.causal_lm.get_input_embeddings().weight:
        return None
    return head

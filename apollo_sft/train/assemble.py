"""Apply parallelism from outside, in one order: attention, build, adapters, checkpointing, shard, optimizer."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim import Optimizer

from apollo_sft.config.schema import ModelConfig, OptimConfig, SftConfig
from apollo_sft.config.values import trains_adapter
from apollo_sft.errors import ConfigError
from apollo_sft.model import attention, load
from apollo_sft.model.proof import prove
from apollo_sft.model.sft_model import SftModel, enable_checkpointing
from apollo_sft.parallel.consensus import from_main
from apollo_sft.parallel.fsdp2 import ShardSpec
from apollo_sft.parallel.launch import World
from apollo_sft.parallel.mesh import Mesh
from apollo_sft.report.log import say
from apollo_sft.train.optim.build import build_optimizer
from apollo_sft.train.precision import Precision, resolve_precision
from apollo_sft.train.strategy import check_strategy, strategy_name, strategy_named, strategy_of
from apollo_sft.train.weights import check_as_built, check_filled, check_read, other_dtypes, set_dtypes
from apollo_sft.types import Growth

if TYPE_CHECKING:
    from apollo_sft.parallel.ulysses import Ulysses


def assemble(
    config: SftConfig, folder: Path, hf_config: Any, world: World, mesh: Mesh, growth: Growth | None = None
) -> tuple[SftModel, Optimizer]:
    """Return the trainable model, sharded over `mesh` when there is one, and its optimizer. Every rank calls it.

    Rank 0 reads the weights and proves the architecture; the others build on meta and receive their shards.
    Raises: ConfigError as `check_strategy`, and when a kernel or the modules to shard are not there.
    """
    check_strategy(config.model, config.optim, world)
    precision = resolve_precision(config.model, world.device.type == "cuda")
    strategy = strategy_named(strategy_name(config.model, world))

    kernel, why = attention.choose_kernel(config.model.attn_implementation, world.device)
    say(why)
    attention.register(attention.sdpa_kernel)  # the proof runs on the CPU

    trust = config.model.trust_remote_code
    adapter = adapter_config(config.model, config.model.partial_pretrain)
    stored = stored_dtype(config.model, world, adapter is not None)
    source = None
    dtypes: dict[str, torch.dtype] = {}
    if world.is_main:
        check = partial(_check_weights, folder=folder, trust_remote_code=trust)
        read = load.load_with_weights(folder, hf_config, stored, trust, growth, check)
        dtypes = other_dtypes(read, stored)
        source = SftModel(_quantised(config.model, read, adapter, world.device))
        prove(source, config.trainer.seed)
        # Adapters come after the proof: it compares with the model of transformers, which has none.
        if adapter is not None:
            from apollo_sft.model import lora

            say(str(lora.inject(source.causal_lm, adapter, precision.master, config.model.lora_adapter_path)))
            source.attach_head()

    attention.register(kernel, head_exchange(mesh))
    if mesh.shard is None:
        assert source is not None, "one process reads its own weights"
        model = shard_model(config.model, source.to(world.device), world, mesh)
    else:
        built = load.build_on_meta(hf_config, stored, trust)
        if strategy.MIXES_DTYPES:
            set_dtypes(built, from_main(dtypes, world))
        causal_lm = _quantised(config.model, built, adapter)
        if adapter is not None:
            from apollo_sft.model import lora

            lora.inject(causal_lm, adapter, precision.master)
        model = shard_model(config.model, SftModel(causal_lm, mesh.sp_rank, mesh.sp_size), world, mesh)
        # On meta until here: no rank but the first ever holds more of the model than its shards.
        strategy.fill(model, source, world.device, offloads(config.model))
        check_filled(strategy.held(model), dict(strategy.outline(model).named_buffers()), source, mesh)

    if config.model.compile:
        from apollo_sft.model.compiled_layers import compile_layers

        say(compile_layers(model.causal_lm))
    return model, optimizer_of(model, config.optim)


def adapter_config(model: ModelConfig, source: str) -> Any | None:
    """Return PEFT's config of the adapter that is trained; None without one. Raises: ConfigError, as `lora_config`."""
    if not trains_adapter(model):
        return None
    from apollo_sft.model.lora import lora_config

    return lora_config(model, source)


def _quantised(model: ModelConfig, causal_lm: Any, adapter: Any, device: torch.device | None = None) -> Any:
    """Return the model with its frozen linear modules in 4 bits, where the config asks for that."""
    if not model.load_in_4bit:
        return causal_lm
    from apollo_sft.model import four_bit

    if device is None:
        return four_bit.quantised(model, causal_lm, adapter)
    return four_bit.quantised(model, causal_lm, adapter, device)


def _check_weights(loaded: Any, folder: Path, trust_remote_code: bool) -> None:
    """Check that rank 0 has read what the files hold, in the form that the other ranks build. Raises: ModelError."""
    check_as_built(loaded, load.build_on_meta(loaded.config, loaded.dtype, trust_remote_code))
    check_read(loaded, folder)


def stored_dtype(model: ModelConfig, world: World, adapted: bool) -> torch.dtype:
    """Return the dtype of the weights that are read.

    Frozen weights, those beside an adapter, get the dtype of the forward where the strategy can mix dtypes.
    """
    precision = resolve_precision(model, world.device.type == "cuda")
    if adapted and strategy_named(strategy_name(model, world)).MIXES_DTYPES:
        return precision.compute
    return precision.master


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


def optimizer_of(model: SftModel, optim: OptimConfig) -> Optimizer:
    """Build the optimizer of a model that may be sharded."""
    return build_optimizer(model.causal_lm, optim, partial(strategy_of(model).num_dims, model))


def offloads(config: ModelConfig) -> bool:
    """Return whether weights, gradients and optimizer state are kept on the CPU."""
    return config.fsdp_config.cpu_offload or config.fsdp_config.offload_params


def needs_group(model: ModelConfig, on_cuda: bool) -> bool:
    """Return whether a single process must shard too: the sharding itself mixes precisions and offloads."""
    return resolve_precision(model, on_cuda).mixed or offloads(model)


def head_exchange(mesh: Mesh) -> Ulysses | None:
    """Return what attention does between ranks that share a sequence; None where each rank has its own."""
    if mesh.sp_group is None:
        return None
    from apollo_sft.parallel.ulysses import Ulysses

    return Ulysses(mesh.sp_group, mesh.sp_rank, mesh.sp_size)


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

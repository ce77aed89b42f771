"""Apply parallelism from outside, in one order: attention, build, adapters, checkpointing, shard, optimizer."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.optim import Optimizer

from apollo_sft.config.schema import ModelConfig, OptimConfig, SftConfig
from apollo_sft.config.values import trains_adapter
from apollo_sft.model import attention, load
from apollo_sft.model.proof import prove
from apollo_sft.model.sft_model import SftModel
from apollo_sft.parallel.consensus import from_main
from apollo_sft.parallel.launch import World
from apollo_sft.parallel.mesh import Mesh
from apollo_sft.report.log import say
from apollo_sft.train.optim.build import build_optimizer
from apollo_sft.train.precision import resolve_precision
from apollo_sft.train.sharding import head_exchange, offloads, shard_model
from apollo_sft.train.strategy import check_strategy, strategy_name, strategy_named, strategy_of
from apollo_sft.train.weights import check_as_built, check_filled, check_read, other_dtypes, set_dtypes
from apollo_sft.types import AddedTokens

if TYPE_CHECKING:
    pass


def assemble(
    config: SftConfig, folder: Path, hf_config: Any, world: World, mesh: Mesh, new_tokens: AddedTokens | None = None
) -> tuple[SftModel, Optimizer]:
    """Return the trainable model, sharded over `mesh` when there is one, and its optimizer. Every rank calls it.

    Rank 0 reads the weights and proves the architecture; the others build on meta and receive their shards.
    Raises: ConfigError as `check_strategy`, and when a kernel or the modules to shard are not there.
    """
    check_strategy(config.model, config.optim, world)
    kernel, why = attention.choose_kernel(config.model.attn_implementation, world.device)
    say(why)
    adapter = adapter_config(config.model, config.model.partial_pretrain)

    source = None
    dtypes: dict[str, torch.dtype] = {}
    if world.is_main:
        attention.register(attention.sdpa_kernel)  # the proof runs on the CPU
        stored = stored_dtype(config.model, world, adapter is not None)
        check = partial(_check_weights, folder=folder, trust_remote_code=config.model.trust_remote_code)
        read = load.load_with_weights(folder, hf_config, stored, config.model.trust_remote_code, new_tokens, check)
        dtypes = other_dtypes(read, stored)
        source = SftModel(_quantised(config.model, read, adapter, world.device))
        prove(source, config.trainer.seed)
        # Adapters come after the proof: it compares with the model of transformers, which has none.
        if adapter is not None:
            say(_inject(source.causal_lm, adapter, config.model, world, config.model.lora_adapter_path))
            source.attach_head()

    attention.register(kernel, head_exchange(mesh))
    if mesh.shard is None:
        assert source is not None, "one process reads its own weights"
        model = shard_model(config.model, source.to(world.device), world, mesh)
    else:
        outline = _outline(config.model, hf_config, world, adapter, dtypes)
        model = shard_model(config.model, SftModel(outline, mesh.sp_rank, mesh.sp_size), world, mesh)
        # On meta until here: no rank but the first ever holds more of the model than its shards.
        strategy = strategy_of(model)
        strategy.fill(model, source, world.device, offloads(config.model))
        check_filled(strategy.held(model), dict(strategy.outline(model).named_buffers()), source, mesh)

    if config.model.compile:
        from apollo_sft.model.compiled_layers import compile_layers

        say(compile_layers(model.causal_lm))
    return model, optimizer_of(model, config.optim)


def _outline(model: ModelConfig, hf_config: Any, world: World, adapter: Any, dtypes: Mapping[str, torch.dtype]) -> Any:
    """Build the model on meta, as every rank shards it. Collective.

    `dtypes`: on rank 0, those of the weights that are held in another dtype than most.
    """
    stored = stored_dtype(model, world, adapter is not None)
    built = load.build_on_meta(hf_config, stored, model.trust_remote_code)
    if strategy_named(strategy_name(model, world)).MIXES_DTYPES:
        set_dtypes(built, from_main(dtypes, world))

    causal_lm = _quantised(model, built, adapter)
    if adapter is not None:
        _inject(causal_lm, adapter, model, world)
    return causal_lm


def _inject(causal_lm: Any, adapter: Any, model: ModelConfig, world: World, path: str | None = None) -> str:
    """Put adapters into a model, filled from the folder `path` if there is one; return what was adapted, in words."""
    from apollo_sft.model.lora import inject

    master = resolve_precision(model, world.device.type == "cuda").master
    return str(inject(causal_lm, adapter, master, path))


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


def optimizer_of(model: SftModel, optim: OptimConfig) -> Optimizer:
    """Build the optimizer of a model that may be sharded."""
    return build_optimizer(model.causal_lm, optim, partial(strategy_of(model).num_dims, model))

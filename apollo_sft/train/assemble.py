"""Parallelism is applied from outside, in one order: attention, build, adapters, checkpointing, shard, optimizer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.optim import Optimizer

from apollo_sft.config.schema import ModelConfig, SftConfig
from apollo_sft.errors import ConfigError
from apollo_sft.model import attention, load, lora
from apollo_sft.model.proof import prove
from apollo_sft.model.sft_model import SftModel
from apollo_sft.parallel import fsdp2
from apollo_sft.parallel.launch import World
from apollo_sft.parallel.mesh import Mesh
from apollo_sft.parallel.ulysses import Ulysses
from apollo_sft.report.log import say
from apollo_sft.train.optim import build_optimizer

DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class Precision:
    """`master`: the weights that the optimizer updates. `compute`: forward and backward. `reduce`: gradient sums."""

    master: torch.dtype
    compute: torch.dtype
    reduce: torch.dtype

    @property
    def mixed(self) -> bool:
        return self.master != self.compute


def resolve_precision(model: ModelConfig, on_cuda: bool) -> Precision:
    """`model.fsdp_config.dtype=auto` is bf16 on CUDA and fp32 on CPU; everything is fp64 when the masters are."""
    master = DTYPES[model.fsdp_config.model_dtype]
    if master == torch.float64:
        return Precision(master, master, master)
    wanted = model.fsdp_config.dtype
    compute = (torch.bfloat16 if on_cuda else master) if wanted == "auto" else DTYPES[wanted]
    return Precision(master, compute, torch.float32)


def assemble(config: SftConfig, folder: Path, hf_config: Any, world: World, mesh: Mesh) -> tuple[SftModel, Optimizer]:
    """The trainable model, sharded over `mesh` when there is one, and its optimizer. Every rank calls it.

    Rank 0 reads the weights and proves the architecture; the others build on meta and receive their shards.
    """
    precision = resolve_precision(config.model, world.device.type == "cuda")
    kernel, why = attention.choose_kernel(config.model.attn_implementation, world.device)
    say(why)
    attention.register(attention.sdpa_kernel)  # the proof runs on the CPU
    trust = config.model.trust_remote_code
    adapter = lora.lora_config(config.model, config.model.partial_pretrain)
    stored = precision.master if adapter is None else precision.compute
    source = None
    if world.is_main:
        source = SftModel(load.load_with_weights(folder, hf_config, stored, trust))
        prove(source, config.trainer.seed)
        if adapter is not None:
            say(str(lora.inject(source.causal_lm, adapter, precision.master, config.model.lora_adapter_path)))
    attention.register(kernel, _exchange(mesh))
    if mesh.shard is None:
        assert source is not None, "one process reads its own weights"
        model = source.to(world.device)
        _enable_checkpointing(model, config.model)
    else:
        causal_lm = load.build_on_meta(hf_config, stored, trust)
        if adapter is not None:
            lora.inject(causal_lm, adapter, precision.master)
        model = SftModel(causal_lm, mesh.sp_rank, mesh.sp_size)
        _enable_checkpointing(model, config.model)
        spec = _shard_spec(model, config.model, precision)
        fsdp2.shard(model, mesh.shard, spec, _own_head(model))
        fsdp2.fill(model, source, world.device, spec.offload)
    model.reduces_once = config.model.fsdp_config.use_no_sync_for_gradient_accumulation
    return model, build_optimizer(model.parameters(), config.optim)


def offloads(config: ModelConfig) -> bool:
    """`cpu_offload` and `offload_params` are one switch."""
    return config.fsdp_config.cpu_offload or config.fsdp_config.offload_params


def needs_group(config: SftConfig, on_cuda: bool) -> bool:
    """Whether a single process must shard too: what it asks for is done by the sharding itself."""
    return resolve_precision(config.model, on_cuda).mixed or offloads(config.model)


def _exchange(mesh: Mesh) -> Ulysses | None:
    return None if mesh.sp_group is None else Ulysses(mesh.sp_group, mesh.sp_rank, mesh.sp_size)


def _enable_checkpointing(model: SftModel, config: ModelConfig) -> None:
    if config.enable_gradient_checkpointing:
        model.causal_lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def _shard_spec(model: SftModel, config: ModelConfig, precision: Precision) -> fsdp2.ShardSpec:
    wanted = config.fsdp_config.wrap_policy.transformer_layer_cls_to_wrap
    names = wanted or tuple(model.causal_lm._no_split_modules or ())
    if not names:
        raise ConfigError(
            f"{type(model.causal_lm).__name__} does not say which of its modules are its layers",
            fix="model.fsdp_config.wrap_policy.transformer_layer_cls_to_wrap=[ClassName]",
        )
    return fsdp2.ShardSpec(
        layer_names=frozenset(names),
        compute_dtype=precision.compute,
        reduce_dtype=precision.reduce,
        reshard_after_forward=config.fsdp_config.reshard_after_forward,
        min_num_params=config.fsdp_config.wrap_policy.min_num_params,
        offload=offloads(config),
    )


def _own_head(model: SftModel) -> torch.nn.Module | None:
    """The head when its weight is its own, None when it is the embedding's."""
    head: torch.nn.Module = model.causal_lm.get_output_embeddings()
    tied = head.weight is model.causal_lm.get_input_embeddings().weight
    return None if tied else head

"""The two ways to shard, FSDP2 and FSDP1, as one set of functions."""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from typing import Protocol, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.optim import Optimizer

from apollo_sft.config.schema import ModelConfig, OptimConfig
from apollo_sft.model.sft_model import SftModel
from apollo_sft.parallel.fsdp2 import ShardSpec
from apollo_sft.parallel.launch import World
from apollo_sft.train.optim.build import check_optimizer
from apollo_sft.train.precision import resolve_precision

M = TypeVar("M", bound=nn.Module)


class Strategy(Protocol):
    """The functions that `parallel.fsdp2` and `parallel.fsdp1` both have; the first documents them."""

    MIXES_DTYPES: bool

    def check(self, shard_size: int, compute_dtype: torch.dtype, reduces_once: bool) -> None: ...
    def shard(self, model: M, mesh: DeviceMesh, spec: ShardSpec, head: nn.Module | None) -> M: ...
    def fill(self, model: nn.Module, source: nn.Module | None, device: torch.device, offload: bool) -> None: ...
    def reduce_gradients(self, model: nn.Module, wanted: bool) -> None: ...
    def grad_norm(self, model: nn.Module, parameters: Iterable[nn.Parameter]) -> Tensor: ...
    def num_dims(self, model: nn.Module, parameter: nn.Parameter) -> int: ...
    def reshard(self, model: nn.Module) -> None: ...
    def as_row_sharded(self, model: M, gradients: bool = False) -> M: ...
    def outline(self, model: M) -> M: ...
    def held(self, model: nn.Module) -> dict[str, tuple[int, Tensor]]: ...
    def optimizer_as_row_sharded(self, model: nn.Module, rows: nn.Module, optimizer: Optimizer) -> Optimizer: ...
    def load_row_sharded(
        self, model: nn.Module, optimizer: Optimizer, rows: nn.Module, rows_optimizer: Optimizer
    ) -> None: ...


MODULES = {"fsdp2": "apollo_sft.parallel.fsdp2", "fsdp": "apollo_sft.parallel.fsdp1"}
"""The module of each `model.strategy`, loaded when it is needed."""


def strategy_named(name: str) -> Strategy:
    """Return the functions of a strategy by the name that `model.strategy` has."""
    return cast(Strategy, importlib.import_module(MODULES[name]))


def strategy_of(model: SftModel) -> Strategy:
    """Return the functions of the strategy that shards a model. They do nothing to one that is not sharded."""
    return strategy_named(model.strategy)


def check_strategy(model: ModelConfig, optim: OptimConfig, world: World) -> None:
    """Raise ConfigError when the strategy cannot train exactly what the keys ask for."""
    fsdp = model.fsdp_config
    precision = resolve_precision(model, world.device.type == "cuda")
    name = strategy_name(model, world)

    strategy_named(name).check(fsdp.fsdp_size, precision.compute, fsdp.use_no_sync_for_gradient_accumulation)
    check_optimizer(optim, name)
    if model.compile:
        from apollo_sft.model.compiled_layers import check_compile

        check_compile(world.device, name)


def strategy_name(model: ModelConfig, world: World) -> str:
    """Return the name of the strategy that shards. One process shards nothing: FSDP2 mixes precisions and offloads."""
    if world.size == 1:
        return "fsdp2"
    return model.strategy

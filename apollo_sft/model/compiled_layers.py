"""torch.compile of the layers, one by one: what is between attention and attention, in fused kernels."""

from __future__ import annotations

import os
import shutil
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from apollo_sft.errors import ConfigError
from apollo_sft.model.attention import NAME

GRAPHS = 64
"""Forms of a layer that are compiled before torch gives up: of each kind, in training and not, of one token or more."""


def check_compile(device: torch.device, strategy: str) -> None:
    """Raises: ConfigError when there is no compiler for the kernels that torch writes, or for FSDP1's flat weights."""
    if strategy == "fsdp":
        raise ConfigError(
            "model.compile=true needs model.strategy=fsdp2: FSDP1 puts other weights into a layer at each call",
            found="model.strategy=fsdp on several processes",
            fix="model.strategy=fsdp2, or model.compile=false",
        )
    on_cuda = device.type == "cuda"
    compiler = os.environ.get("CC", "gcc") if on_cuda else os.environ.get("CXX", "g++")
    missing = [] if shutil.which(compiler) else [f"the compiler {compiler}"]
    missing += ["the package triton"] if on_cuda and find_spec("triton") is None else []
    if missing:
        raise ConfigError(
            "model.compile=true needs what is not installed here",
            found=f"{' and '.join(missing)} not found",
            fix="install it (Debian: apt-get install g++), or model.compile=false",
        )


def compile_layers(causal_lm: Any) -> str:
    """Compile the forward of every layer, in place, and say so. The names of weights stay.

    Attention, whose documents differ from pack to pack, runs as it is; so does what sharding and checkpointing do
    around a layer. Kernels are written when a layer first runs, for any number of tokens.
    """
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    torch._dynamo.config.recompile_limit = max(GRAPHS, torch._dynamo.config.recompile_limit)
    ALL_ATTENTION_FUNCTIONS.register(NAME, torch.compiler.disable(ALL_ATTENTION_FUNCTIONS[NAME]))  # type: ignore[no-untyped-call]
    lists = [module for module in causal_lm.modules() if isinstance(module, nn.ModuleList)]
    kinds = set(causal_lm._no_split_modules or ())
    layers = [layer for some in lists for layer in some if _class_name(layer) in kinds]
    for layer in layers:
        layer.forward = torch.compile(layer.forward, dynamic=True)
    return f"torch.compile: {len(layers)} layers; the first steps take longer, while kernels are written"


def _class_name(layer: nn.Module) -> str:
    """As transformers has it: `fully_shard` puts FSDP before the name of the class."""
    return type(layer).__name__.removeprefix("FSDP")

"""torch.compile of the layers, one by one: fused kernels for what a layer computes outside of attention."""

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
"""The number of forms of a layer that torch may compile: of each kind, in training and not, of one token or more."""


def check_compile(device: torch.device, strategy: str) -> None:
    """Raise a ConfigError under FSDP1, or when there is no compiler for the kernels that torch generates."""
    if strategy == "fsdp":
        raise ConfigError(
            "model.compile=true needs model.strategy=fsdp2: FSDP1 replaces the weights of a layer at each call",
            found="model.strategy=fsdp on several processes",
            fix="model.strategy=fsdp2, or model.compile=false",
        )

    # Kernels are Triton on CUDA, with a launcher in C, and C++ on the CPU.
    on_cuda = device.type == "cuda"
    compiler = os.environ.get("CC", "gcc") if on_cuda else os.environ.get("CXX", "g++")
    missing = []
    if not shutil.which(compiler):
        missing.append(f"the compiler {compiler}")

    if on_cuda and find_spec("triton") is None:
        missing.append("the package triton")

    if missing:
        raise ConfigError(
            "model.compile=true needs what is not installed here",
            found=f"{' and '.join(missing)} not found",
            fix="install it (Debian: apt-get install g++), or model.compile=false",
        )


def compile_layers(causal_lm: Any) -> str:
    """Compile the forward of every layer, in place; return a sentence for the log. The names of weights stay.

    Attention, whose documents differ from pack to pack, is not compiled, nor is what sharding and checkpointing do
    around a layer. Kernels are generated when a layer first runs, for any number of tokens.
    """
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    torch._dynamo.config.recompile_limit = max(GRAPHS, torch._dynamo.config.recompile_limit)
    ALL_ATTENTION_FUNCTIONS.register(NAME, torch.compiler.disable(ALL_ATTENTION_FUNCTIONS[NAME]))  # type: ignore[no-untyped-call]

    # Only modules in lists are layers: `_no_split_modules` may name others, such as embeddings.
    kinds = set(causal_lm._no_split_modules or ())
    num_layers = 0
    for module in causal_lm.modules():
        if not isinstance(module, nn.ModuleList):
            continue
        for layer in module:
            if _class_name(layer) in kinds:
                layer.forward = torch.compile(layer.forward, dynamic=True)
                num_layers += 1

    return f"torch.compile: {num_layers} layers; the first steps take longer, while kernels are generated"


def _class_name(layer: nn.Module) -> str:
    """Return the name of the class in transformers: `fully_shard` adds the prefix FSDP."""
    return type(layer).__name__.removeprefix("FSDP")

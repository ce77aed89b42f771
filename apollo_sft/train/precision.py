"""In which dtypes a run computes."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from apollo_sft.config.schema import ModelConfig

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

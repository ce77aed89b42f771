"""The dtypes in which a run computes."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from apollo_sft.config.schema import ModelConfig

DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class Precision:
    """The dtypes of a run."""

    master: torch.dtype
    """Of the weights that the optimizer updates."""

    compute: torch.dtype
    """Of forward and backward."""

    reduce: torch.dtype
    """Of the sums of gradients over ranks."""

    @property
    def mixed(self) -> bool:
        """Return whether the forward needs a copy of the weights in another dtype."""
        return self.master != self.compute


def resolve_precision(model: ModelConfig, on_cuda: bool) -> Precision:
    """Return the dtypes that the keys ask for.

    `model.fsdp_config.dtype=auto` is bf16 on CUDA and that of the weights on CPU; all are fp64 when the weights are.
    """
    master = DTYPES[model.fsdp_config.model_dtype]
    if master == torch.float64:
        return Precision(master, master, master)

    wanted = model.fsdp_config.dtype
    if wanted != "auto":
        compute = DTYPES[wanted]
    elif on_cuda:
        compute = torch.bfloat16
    else:
        compute = master
    return Precision(master, compute, torch.float32)

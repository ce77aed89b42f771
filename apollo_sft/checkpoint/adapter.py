"""An adapter in PEFT's own format, beside the model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from apollo_sft.checkpoint import publish

FOLDER = "adapter"


def save_adapter(tensors: Mapping[str, Tensor], config: Any, root: Path, is_writer: bool) -> None:
    """Write `root/adapter/`. Collective: every rank takes part in gathering. `config` is PEFT's."""
    whole = {}
    for name, tensor in tensors.items():
        full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if is_writer:
            whole[name] = full.cpu().contiguous()
    if not is_writer:
        return
    staging = publish.staging_folder(root, FOLDER)
    save_file(whole, staging / "adapter_model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(staging)
    publish.publish_directory(staging, root / FOLDER)

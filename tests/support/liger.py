"""The architectures that Liger's kernels are used for, as tiny configs, and a step with them and without."""

import sys
from typing import Any

import torch
import transformers
from torch import Tensor

from apollo_sft.model import attention, liger
from apollo_sft.model.sft_model import SftModel
from tests.support.models import SMALL, tiny_model

GEMMA = {"head_dim": 8, "query_pre_attn_scalar": 20, "sliding_window": 4}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "exaone4": ("Exaone4", {"sliding_window": 4}),
    "gemma": ("Gemma", {"head_dim": 8}),
    "gemma2": ("Gemma2", GEMMA),
    "gemma3_text": ("Gemma3Text", GEMMA),
    "glm4": ("Glm4", {"head_dim": 8, "partial_rotary_factor": 0.5}),
    "gpt_oss": ("GptOss", {"head_dim": 8, "num_local_experts": 4, "sliding_window": 4}),
    "granite": ("Granite", {"logits_scaling": 2.0}),
    "hunyuan_v1_dense": ("HunYuanDenseV1", {"head_dim": 8}),
    "llama": ("Llama", {}),
    "mistral": ("Mistral", {}),
    "mixtral": ("Mixtral", {"num_local_experts": 4}),
    "olmo2": ("Olmo2", {}),
    "olmo3": ("Olmo3", {"sliding_window": 4}),
    "phi3": ("Phi3", {"partial_rotary_factor": 0.5}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"head_dim": 8}),
    "qwen3_moe": (
        "Qwen3Moe",
        {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
    ),
    "smollm3": ("SmolLM3", {}),
}


def model_of(family: str, device: str = "cpu", dtype: torch.dtype = torch.float32) -> SftModel:
    name, changes = FAMILIES[family]
    config = getattr(transformers, f"{name}Config")(**(SMALL | changes))
    assert config.model_type == family
    attention.register(attention.sdpa_kernel)
    return SftModel(tiny_model(config, dtype, attention.NAME).to(device))


def step(model: SftModel) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradient of two packed documents."""
    device = next(model.parameters()).device
    ids = torch.randint(0, 97, (14,), generator=torch.Generator().manual_seed(0))
    at = torch.tensor([i for i in range(14) if i not in (4, 13)])
    positions = torch.cat([torch.arange(5), torch.arange(9)])
    starts = torch.tensor([0, 5, 14], dtype=torch.int32)
    parts = [part.to(device) for part in (ids[None], positions[None], starts, at, ids[at + 1])]
    loss = model(*parts[:3], 9, *parts[3:])
    loss.backward()
    return float(loss.detach()), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def with_kernels(model: SftModel) -> SftModel:
    liger.apply(model.causal_lm)
    return model


def patched(model: SftModel) -> set[str]:
    """The classes of modules that have another forward than their class says."""
    return {type(module).__name__ for module in model.modules() if "forward" in vars(module)}


def rope_of(model: SftModel) -> Any:
    return getattr(sys.modules[type(model.causal_lm).__module__], liger.ROPE)


def set_rope(model: SftModel, rope: Any) -> SftModel:
    setattr(sys.modules[type(model.causal_lm).__module__], liger.ROPE, rope)
    return model

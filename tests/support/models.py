"""Tiny models from a config, with seeded weights. Nothing is downloaded."""

import copy
from pathlib import Path
from typing import Any

import torch
import transformers

SMALL = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def tiny_config(family: str = "Qwen2", **changes: Any) -> Any:
    """The config of a model of this family (the prefix of its transformers classes) with two small layers."""
    return getattr(transformers, f"{family}Config")(**(SMALL | changes))


def tiny_model(config: Any, dtype: torch.dtype = torch.float64, attention: str = "eager", seed: int = 0) -> Any:
    """A causal language model with weights large enough that every part of it matters."""
    model = transformers.AutoModelForCausalLM.from_config(
        copy.deepcopy(config), dtype=dtype, attn_implementation=attention
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=dtype) * 0.2)
    return model


def save_tiny_model(folder: Path, config: Any, dtype: torch.dtype = torch.float32) -> Path:
    tiny_model(config, dtype).save_pretrained(folder)
    return folder


def save_tiny_adapter(base: Path, **changes: Any) -> Path:
    """An adapter of rank 3 on every linear module, with random values, in `base/adapter`. `changes`: of its config."""
    from peft import LoraConfig, get_peft_model

    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    settings = {"r": 3, "lora_alpha": 6, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | changes
    adapted = get_peft_model(model, LoraConfig(**settings))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    adapted.save_pretrained(base / "adapter")
    return base / "adapter"

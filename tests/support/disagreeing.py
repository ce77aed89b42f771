"""Base models whose config.json and files say different things of the head, and what an oracle makes of their files."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from tests.support.models import SMALL, tiny_config, tiny_model

HEAD = "lm_head.weight"
VISION = {
    "text_config": {**SMALL, "head_dim": 8, "sliding_window": 4},
    "vision_config": {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    },
    "mm_tokens_per_image": 1,
    "image_token_index": 96,
    "boi_token_index": 95,
    "eoi_token_index": 94,
    "eos_token_id": 2,
}
"""A Gemma 3 of text and images."""


def gemma3_with_vision(**changes: Any) -> Any:
    from transformers import Gemma3Config

    return Gemma3Config(**(VISION | changes))


def write_disagreeing(folder: Path, kind: str) -> Path:
    """Write a base of one kind: what config.json says of the tie, a dash, and what the files hold."""
    tied, held = kind.split("-", 1)
    vision = held.startswith("vision")
    config = gemma3_with_vision(tie_word_embeddings=False) if vision else tiny_config("Qwen2")
    config.tie_word_embeddings = held == "one"
    tiny_model(config, torch.float32).save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    head = next((name for name in weights if name.endswith(HEAD)), HEAD)
    [embedding] = [name for name in weights if name.endswith("embed_tokens.weight")]
    if held == "equal":
        weights[head] = weights[embedding].clone()
    if held == "head":
        del weights[embedding]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    raw = json.loads((folder / "config.json").read_text())
    for part in (raw, raw.get("text_config", {})):
        part["tie_word_embeddings"] = tied == "ties"
    (folder / "config.json").write_text(json.dumps(raw, indent=2))
    return folder


def write_with_a_float32_buffer(folder: Path) -> Path:
    """Write a DeepSeek-V3 in bfloat16 whose router has a bias in float32, as the real files have it."""
    sizes = {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "n_group": 1,
        "topk_group": 1,
    }
    heads = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
    config = tiny_config("DeepseekV3", num_key_value_heads=4, **sizes, first_k_dense_replace=1, **heads)
    tiny_model(config, torch.bfloat16).save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    [name] = [name for name in weights if name.endswith("e_score_correction_bias")]
    weights[name] = torch.tensor([0.1, -0.7768, 0.31, 0.02])
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def as_the_files_say(folder: Path) -> Any:
    """Build the model in float64 by hand: a head of its own, filled with what the files hold, name by name."""
    config = AutoConfig.from_pretrained(folder)
    config.tie_word_embeddings = config.get_text_config().tie_word_embeddings = False
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float64, attn_implementation="eager")
    weights = load_file(folder / "model.safetensors")
    table = next(value for name, value in weights.items() if name.endswith(("embed_tokens.weight", HEAD)))
    missing = {name: table for name in (HEAD, "model.embed_tokens.weight") if name in model.state_dict()}
    renamed = {_in_memory(name): value for name, value in weights.items()}
    model.load_state_dict({name: value.double() for name, value in (missing | renamed).items()}, strict=False)
    return model


def _in_memory(name: str) -> str:
    """Rename a tensor of Gemma 3's files as transformers 5 does."""
    if name.startswith("language_model.model."):
        return f"model.language_model.{name.removeprefix('language_model.model.')}"
    return name.removeprefix("language_model.")

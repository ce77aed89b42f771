"""Make a small copy of an architecture, for any machine: the same structure, two layers, narrow, seeded weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

HEAD_DIM = 8
"""Divisible by 4: rotary embeddings of half or a quarter of it have an even width."""
WINDOW = 8
"""Tokens that a sliding window sees: far fewer than most documents have, so that it matters."""
WIDTHS = {
    "intermediate_size": 64,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "shared_intermediate_size": 32,
    "intermediate_size_mlp": 64,
    "dense_intermediate_size": 64,
    "ffn_dim": 64,
    "q_lora_rank": 16,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": HEAD_DIM,
    "qk_rope_head_dim": 4,
    "v_head_dim": HEAD_DIM,
    "qk_head_dim": HEAD_DIM + 4,
    "sliding_window": WINDOW,
    "attention_chunk_size": WINDOW,
    "max_window_layers": 1,
    "first_k_dense_replace": 1,
    "decoder_sparse_step": 2,
    "interleave_moe_layer_step": 2,
    "num_experts_per_tok": 2,
    "moe_topk": 2,
    "n_group": 2,
    "topk_group": 1,
}
"""The largest values in the copy; smaller values, zeros and absent keys stay as they are."""
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
NUM_EXPERTS = 8
NOISE = ("dropout", "pdrop", "jitter_noise")
SMALL_VISION = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}


def shrink(config: Any, vocab_size: int, pad_token_id: int | None = None) -> Any:
    """Return the config of the copy. Head counts stay as they are, and with them the ratio of query to key heads.

    The same holds for the kinds of layers (one of each of the first two kinds), biases, norms, scales, caps and tied
    weights. `pad_token_id`: as in the smaller vocabulary, None when it has no such token.
    """
    raw = config.to_dict()
    text = config.get_text_config()
    parts = [key for key in type(config).sub_configs if isinstance(raw.get(key), dict)]
    for key in parts:
        if getattr(config, key) is text:
            raw[key] = _shrink_text(raw[key], text, vocab_size, pad_token_id)
        else:
            raw[key] |= {name: value for name, value in SMALL_VISION.items() if name in raw[key]}

    if text is config:
        raw = _shrink_text(raw, text, vocab_size, pad_token_id)
    return silent(type(config).from_dict(raw))


def silent(config: Any) -> Any:
    """Turn dropout and noise off, in place, and return the config: random results cannot be compared."""
    for part in (config, config.get_text_config()):
        for name, value in list(vars(part).items()):
            if name.endswith(NOISE) and isinstance(value, float):
                setattr(part, name, 0.0)
    return config


def _shrink_text(raw: dict[str, Any], text: Any, vocab_size: int, pad_token_id: int | None) -> dict[str, Any]:
    names = getattr(text, "attribute_map", {})  # GPT-2 has n_embd for hidden_size
    heads = text.num_attention_heads
    head_dim = _head_dim(text)
    small_head = min(HEAD_DIM, head_dim)

    # Where the heads together are not as wide as the model, they must not be so in the copy.
    hidden_size = heads * (small_head - 2)
    if heads * head_dim == text.hidden_size:
        hidden_size = heads * small_head

    small = raw | {name: min(raw[name], limit) for name, limit in WIDTHS.items() if _is_size(raw.get(name))}
    small |= {name: min(raw[name], NUM_EXPERTS) for name in EXPERTS if _is_size(raw.get(name))}
    small |= _two_layers(raw, text.num_hidden_layers)
    small["rope_parameters"] = _rope(raw.get("rope_parameters"), small_head)
    # Both scale attention by the width of a head: the first one grows with it, the other one shrinks.
    for name, power in (("query_pre_attn_scalar", 1), ("attention_multiplier", -1)):
        if raw.get(name) is not None:
            small[name] = type(raw[name])(raw[name] * (small_head / head_dim) ** power)

    sizes = {
        "hidden_size": min(text.hidden_size, hidden_size),
        "num_hidden_layers": min(2, text.num_hidden_layers),
        "vocab_size": vocab_size,
    }
    small |= {names.get(name, name): value for name, value in sizes.items()}
    if raw.get("head_dim") is not None:  # with latent attention it is the rotary part alone
        small["head_dim"] = small.get("qk_rope_head_dim") or small_head
    return small | {"pad_token_id": pad_token_id, "bos_token_id": None, "eos_token_id": None}


def _head_dim(text: Any) -> int:
    return int(getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _two_layers(raw: dict[str, Any], num_layers: int) -> dict[str, Any]:
    """Return every list with an entry for each layer, cut to the first layer and the first that differs from it."""
    lists = {name: value for name, value in raw.items() if isinstance(value, list) and len(value) == num_layers}
    kinds = list(zip(*(map(str, value) for value in lists.values()), strict=True))
    second = next((i for i, kind in enumerate(kinds) if kind != kinds[0]), min(1, num_layers - 1))
    chosen = (0, second)[: min(2, num_layers)]
    small: dict[str, Any] = {name: list(map(value.__getitem__, chosen)) for name, value in lists.items()}
    if raw.get("mlp_only_layers"):
        small["mlp_only_layers"] = [0]
    return small


def _rope(parameters: Any, head_dim: int) -> Any:
    """Return the rotary parameters for narrow heads: of factors for each pair of channels only as many are left."""
    if not isinstance(parameters, dict):
        return parameters
    if all(isinstance(value, dict) for value in parameters.values()):
        return {kind: _rope(value, head_dim) for kind, value in parameters.items()}

    pairs = int(head_dim * parameters.get("partial_rotary_factor", 1.0)) // 2
    small = dict(parameters)
    for name in ("short_factor", "long_factor"):
        if name in small:
            small[name] = small[name][:: max(1, len(small[name]) // pairs)][:pairs]

    if "mrope_section" in small:
        small["mrope_section"] = [pairs - 2 * (pairs // 3), pairs // 3, pairs // 3]
    return small


def write_model(config: Any, folder: Path, seed: int) -> int:
    """Build the model of `config` in float64, save it, and return its number of parameters.

    Weights are large enough for every part to matter: matrices keep the size of what passes through them, vectors
    (norm gains, biases, sinks) are moved away from where they start.
    """
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float64, attn_implementation="eager")
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(_drawn(parameter))

    model.save_pretrained(folder)
    return sum(parameter.numel() for parameter in model.parameters())


def _drawn(parameter: Tensor) -> Tensor:
    if parameter.ndim < 2:
        return parameter + 0.2 * torch.randn_like(parameter)
    return torch.randn_like(parameter).div(min(parameter.shape[-2:]) ** 0.5)

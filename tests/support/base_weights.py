"""Weight files of tiny base models, under the names that the files of real families have. Values are seeded."""

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

Shapes = dict[str, tuple[int, ...]]
Config = dict[str, Any]
BESIDE_ONE = ("norm.weight", "layernorm.weight", "ln_1.weight", "ln_2.weight", "ln_f.weight")
"""Ends of names of scales; the others are drawn around zero."""


def decoder_shapes(config: Config, norms: tuple[str, ...] = ("input", "post_attention")) -> Shapes:
    """Name what Llama and its kin hold: embeddings, layers with `norms`, a head unless it is tied."""
    hidden, vocabulary = config["hidden_size"], config["vocab_size"]
    shapes: Shapes = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for layer in range(config["num_hidden_layers"]):
        inner = attention_shapes(config) | mlp_shapes("mlp.", hidden, config["intermediate_size"])
        inner |= {f"{name}_layernorm.weight": (hidden,) for name in norms}
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in inner.items()}
    shapes["model.norm.weight"] = (hidden,)
    if not config.get("tie_word_embeddings", False):
        shapes["lm_head.weight"] = (vocabulary, hidden)
    return shapes


def attention_shapes(config: Config) -> Shapes:
    """Name the four projections of attention."""
    hidden, queries, keys = config["hidden_size"], *head_widths(config)
    names = {"q": (queries, hidden), "k": (keys, hidden), "v": (keys, hidden), "o": (hidden, queries)}
    return {f"self_attn.{name}_proj.weight": shape for name, shape in names.items()}


def head_widths(config: Config) -> tuple[int, int]:
    """Count the rows of queries, and those of keys."""
    width = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    return width * config["num_attention_heads"], width * config["num_key_value_heads"]


def mlp_shapes(prefix: str, hidden: int, inner: int) -> Shapes:
    """Name the three projections of a gated MLP."""
    names = {"gate": (inner, hidden), "up": (inner, hidden), "down": (hidden, inner)}
    return {f"{prefix}{name}_proj.weight": shape for name, shape in names.items()}


def in_layers(config: Config, shapes: Shapes) -> Shapes:
    """Repeat what every layer holds besides."""
    return {
        f"model.layers.{layer}.{name}": shape
        for layer in range(config["num_hidden_layers"])
        for name, shape in shapes.items()
    }


def expert_shapes(config: Config) -> Shapes:
    """Name a router, and each expert by itself, in place of the MLPs."""
    hidden, count = config["hidden_size"], config["num_experts"]
    inner: Shapes = {"mlp.gate.weight": (count, hidden)}
    for expert in range(count):
        inner |= mlp_shapes(f"mlp.experts.{expert}.", hidden, config["moe_intermediate_size"])
    dense = {name: shape for name, shape in decoder_shapes(config).items() if ".mlp." not in name}
    return dense | in_layers(config, inner)


def fused_shapes(config: Config) -> Shapes:
    """Name the layers of Phi-3, whose projections lie in two tensors."""
    hidden, (queries, keys) = config["hidden_size"], head_widths(config)
    taken = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
    rest = {name: shape for name, shape in decoder_shapes(config).items() if not any(one in name for one in taken)}
    inner = {"self_attn.qkv_proj.weight": (queries + 2 * keys, hidden)}
    return rest | in_layers(config, inner | {"mlp.gate_up_proj.weight": (2 * config["intermediate_size"], hidden)})


def gpt2_shapes(config: Config) -> Shapes:
    """Name GPT-2's layers as its file does: no prefix, masks among the weights, the head left out."""
    hidden = config["n_embd"]
    shapes: Shapes = {"wte.weight": (config["vocab_size"], hidden), "wpe.weight": (config["n_positions"], hidden)}
    for layer in range(config["n_layer"]):
        widths = {"attn.c_attn": 3 * hidden, "attn.c_proj": hidden, "mlp.c_fc": 4 * hidden}
        inner: Shapes = {f"{name}.weight": (hidden, width) for name, width in widths.items()}
        inner |= {f"{name}.bias": (width,) for name, width in widths.items()}
        inner |= {"mlp.c_proj.weight": (4 * hidden, hidden), "mlp.c_proj.bias": (hidden,)}
        inner |= {f"{name}.{kind}": (hidden,) for name in ("ln_1", "ln_2") for kind in ("weight", "bias")}
        shapes |= {f"h.{layer}.{name}": shape for name, shape in inner.items()}
    return shapes | {"ln_f.weight": (hidden,), "ln_f.bias": (hidden,)}


def neox_shapes(config: Config) -> Shapes:
    """Name GPT-NeoX's layers."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    shapes: Shapes = {"gpt_neox.embed_in.weight": (config["vocab_size"], hidden)}
    for layer in range(config["num_hidden_layers"]):
        widths = {"attention.query_key_value": (3 * hidden, hidden), "attention.dense": (hidden, hidden)}
        widths |= {"mlp.dense_h_to_4h": (inner, hidden), "mlp.dense_4h_to_h": (hidden, inner)}
        held: Shapes = {f"{name}.weight": shape for name, shape in widths.items()}
        held |= {f"{name}.bias": shape[:1] for name, shape in widths.items()}
        norms = ("input_layernorm", "post_attention_layernorm")
        held |= {f"{name}.{kind}": (hidden,) for name in norms for kind in ("weight", "bias")}
        shapes |= {f"gpt_neox.layers.{layer}.{name}": shape for name, shape in held.items()}
    shapes |= {f"gpt_neox.final_layer_norm.{kind}": (hidden,) for kind in ("weight", "bias")}
    return shapes | {"embed_out.weight": (config["vocab_size"], hidden)}


def draw(shapes: Shapes, seed: int, zero_centred: bool = False) -> dict[str, Tensor]:
    """Draw weights large enough that every part matters. `zero_centred`: scales too, as Gemma keeps them."""
    generator = torch.Generator().manual_seed(seed)
    drawn = {}
    for name in sorted(shapes):
        values = torch.randn(shapes[name], generator=generator) * 0.2
        drawn[name] = values + 1 if name.endswith(BESIDE_ONE) and not zero_centred else values
    return drawn


def gpt2_masks(config: Config) -> dict[str, Tensor]:
    """Make the causal masks that GPT-2's file holds."""
    positions = config["n_positions"]
    mask = torch.ones(positions, positions).tril().reshape(1, 1, positions, positions)
    return {f"h.{layer}.attn.bias": mask.clone() for layer in range(config["n_layer"])}


def neox_buffers(config: Config) -> dict[str, Tensor]:
    """Make the masks and frequencies that Pythia's files hold."""
    positions, width = config["max_position_embeddings"], config["hidden_size"] // config["num_attention_heads"]
    rotary = int(width * config["rotary_pct"])
    frequencies = 1.0 / config["rotary_emb_base"] ** (torch.arange(0, rotary, 2) / rotary)
    held = {}
    for layer in range(config["num_hidden_layers"]):
        mask = torch.ones(positions, positions, dtype=torch.bool).tril().reshape(1, 1, positions, positions)
        held[f"gpt_neox.layers.{layer}.attention.bias"] = mask
        held[f"gpt_neox.layers.{layer}.attention.masked_bias"] = torch.tensor(-1e9)
        held[f"gpt_neox.layers.{layer}.attention.rotary_emb.inv_freq"] = frequencies.clone()
    return held


def write_weights(folder: Path, tensors: dict[str, Tensor], dtype: torch.dtype) -> None:
    """Write model.safetensors; masks keep their own dtype."""
    save_file(_cast(tensors, dtype), folder / "model.safetensors", metadata={"format": "pt"})


def write_shards(folder: Path, tensors: dict[str, Tensor], dtype: torch.dtype, number: int) -> None:
    """Write several files and the index that names them."""
    cast, names = _cast(tensors, dtype), sorted(tensors)
    size = math.ceil(len(names) / number)
    where: dict[str, str] = {}
    for shard in range(number):
        file = f"model-{shard + 1:05d}-of-{number:05d}.safetensors"
        held = {name: cast[name] for name in names[shard * size : (shard + 1) * size]}
        save_file(held, folder / file, metadata={"format": "pt"})
        where |= dict.fromkeys(held, file)
    total = sum(tensor.numel() * tensor.element_size() for tensor in cast.values())
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _cast(tensors: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}

"""The architectures of the parity table, as tiny configs, and how each is run: packed, alone, and in plain form."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor

from apollo_sft.data.batch.loader import pack
from apollo_sft.model import attention, load
from apollo_sft.model.sft_model import SftModel
from apollo_sft.types import IGNORE_INDEX, MicroBatch, RowRef, Sample
from tests.support.models import SMALL, save_tiny_model, tiny_config

WINDOW = 4
ALTERNATING = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": WINDOW}
HEADS_OF_8 = {"head_dim": 8}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8}
SMALL_VISION = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "image_size": 28}
SMALL_VISION |= {"num_hidden_layers": 1, "patch_size": 14}

MUST_PASS: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("Llama", {}),
    "Llama, biases, scaled rope": (
        "Llama",
        {
            "attention_bias": True,
            "mlp_bias": True,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
            },
        },
    ),
    "Qwen2": ("Qwen2", {}),
    "Qwen2, window in some layers": (
        "Qwen2",
        {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
    ),
    "Qwen3": ("Qwen3", HEADS_OF_8 | {"tie_word_embeddings": True}),
    "Mistral": ("Mistral", {"sliding_window": WINDOW}),
    "Gemma 3": (
        "Gemma3Text",
        HEADS_OF_8 | ALTERNATING | {"query_pre_attn_scalar": 20, "final_logit_softcapping": 3.0},
    ),
    "Phi-3": ("Phi3", {"sliding_window": WINDOW, "partial_rotary_factor": 0.5}),
    "Phi-3, longrope": (
        "Phi3",
        {
            "rope_scaling": {
                "type": "longrope",
                "short_factor": [1.0, 1.5, 2.0, 2.5],
                "long_factor": [1.0, 3.0, 9.0, 27.0],
            },
            "original_max_position_embeddings": 32,
        },
    ),
    "SmolLM3": ("SmolLM3", {"no_rope_layers": [1, 0]}),
    "Granite": (
        "Granite",
        {
            "logits_scaling": 4.0,
            "attention_multiplier": 0.2,
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.5,
        },
    ),
    "OLMo 2": ("Olmo2", {}),
    "Qwen3-MoE": ("Qwen3Moe", HEADS_OF_8 | EXPERTS | {"sliding_window": WINDOW, "use_sliding_window": True}),
}
"""Name in the table -> prefix of the transformers classes, and what is changed in the small config."""

OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "Gemma": ("Gemma", HEADS_OF_8),
    "Gemma 2": (
        "Gemma2",
        HEADS_OF_8
        | ALTERNATING
        | {"query_pre_attn_scalar": 20, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
    ),
    "Gemma 3 with vision, on text": ("Gemma3", HEADS_OF_8 | ALTERNATING),
    "Gemma 3, bidirectional": ("Gemma3Text", HEADS_OF_8 | {"use_bidirectional_attention": True}),
    "Mixtral": ("Mixtral", {"num_local_experts": 4, "sliding_window": WINDOW}),
    "Mixtral, router loss asked for": ("Mixtral", {"num_local_experts": 4, "output_router_logits": True}),
    "gpt-oss": ("GptOss", HEADS_OF_8 | ALTERNATING | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "GLM-4": ("Glm4", HEADS_OF_8 | {"partial_rotary_factor": 0.5}),
    "GLM-4.5 MoE": (
        "Glm4Moe",
        HEADS_OF_8 | {"n_routed_experts": 4, "num_experts_per_tok": 2, "first_k_dense_replace": 1},
    ),
    "DeepSeek-V3": (
        "DeepseekV3",
        LATENT
        | {"num_key_value_heads": 4, "n_routed_experts": 8, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2}
        | {"first_k_dense_replace": 1, "moe_intermediate_size": 24},
    ),
    "Cohere": ("Cohere", {"logit_scale": 0.25, "use_qk_norm": True}),
    "Cohere 2": ("Cohere2", ALTERNATING | {"logit_scale": 0.25}),
    "OLMo": ("Olmo", {"clip_qkv": 0.5}),
    "OLMo 3": ("Olmo3", ALTERNATING),
    "OLMoE": ("Olmoe", {"num_experts": 4, "num_experts_per_tok": 2}),
    "Phi": ("Phi", {"partial_rotary_factor": 0.5, "qk_layernorm": True}),
    "Starcoder 2": ("Starcoder2", {"sliding_window": WINDOW}),
    "Ernie 4.5": ("Ernie4_5", HEADS_OF_8),
    "Seed-OSS": ("SeedOss", HEADS_OF_8),
    "Nemotron": ("Nemotron", {}),
    "GPT-2": ("GPT2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}),
    "GPT-NeoX": ("GPTNeoX", {"rotary_pct": 0.25}),
    "OPT": ("OPT", {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    "Falcon (ALiBi)": ("Falcon", {"alibi": True}),
    "Bloom (ALiBi)": ("Bloom", {}),
    "Llama 4 (text)": ("Llama4Text", {}),
    "MiniMax": ("MiniMax", {}),
    "Qwen3.5": ("Qwen3_5Text", {}),
    "Qwen3-Next": ("Qwen3Next", {}),
    "Granite 4 (hybrid)": ("GraniteMoeHybrid", {"mamba_n_heads": 4}),
    "Granite 4 (attention only)": (
        "GraniteMoeHybrid",
        {"mamba_n_heads": 4, "layer_types": ["full_attention"] * 2, "num_local_experts": 4, "num_experts_per_tok": 2}
        | {"shared_intermediate_size": 24, "logits_scaling": 4.0},
    ),
    "Jamba": ("Jamba", {}),
    "Mamba": ("Mamba", {}),
    "Mamba 2": ("Mamba2", {"num_heads": 8, "head_dim": 8}),
    "LFM2": ("Lfm2", {"layer_types": ["conv", "full_attention"]}),
}
"""Those that pass or are refused with the reason."""

CASES = MUST_PASS | OTHERS


def case_config(name: str) -> Any:
    family, changes = CASES[name]
    if family == "Gemma3":
        return transformers.Gemma3Config(text_config=SMALL | changes, vision_config=SMALL_VISION)
    return tiny_config(family, **changes)


def transformers_class(config: Any) -> str:
    return str(transformers.AutoModelForCausalLM._model_mapping[type(config)].__name__)


def save_case(folder: Path, name: str) -> Path:
    """The folder of this architecture, with weights. Made once."""
    place = folder / str(list(CASES).index(name))
    return place if place.exists() else save_tiny_model(place, case_config(name))


def load_case(place: Path) -> Any:
    """The model in fp64 as a run loads it. Raises: ModelError when a run refuses it."""
    config = load.read_config(place, trust_remote_code=False)
    load.check_architecture(config, trust_remote_code=False)
    return load.load_with_weights(place, config, torch.float64, trust_remote_code=False).eval()


def documents() -> list[Sample]:
    """Documents shorter and longer than the window; one of a single token, one without a target."""
    rng = np.random.default_rng(0)
    samples = []
    for row, tokens in enumerate((7, 1, 13, 4, 6)):
        ids = rng.integers(0, 97, tokens).astype(np.int32)
        labels = np.append(ids[1:], IGNORE_INDEX).astype(np.int32)
        labels[: tokens if row == 3 else tokens // 3] = IGNORE_INDEX
        samples.append(Sample(ids, labels, RowRef("rows", row), (1,)))
    return samples


Gradients = dict[str, Tensor]


def _take_gradients(causal_lm: Any) -> Gradients:
    gradients = {n: p.grad if p.grad is not None else torch.zeros_like(p) for n, p in causal_lm.named_parameters()}
    causal_lm.zero_grad(set_to_none=True)
    return gradients


def run_packed(model: SftModel, micro_batch: MicroBatch) -> tuple[float, Gradients]:
    """As a run does it."""
    loss = model.loss_sum(micro_batch, torch.device("cpu"))
    loss.backward()  # type: ignore[no-untyped-call]
    return float(loss.detach()), _take_gradients(model.causal_lm)


def run_alone(causal_lm: Any, samples: list[Sample]) -> tuple[float, Gradients]:
    """One document at a time through the model's own forward, head and all; cross-entropy of the full logits."""
    total = torch.zeros((), dtype=torch.float64)
    for sample in samples:
        one = pack([sample])
        ours = causal_lm.config._attn_implementation == attention.NAME
        more = {"document_starts": one.document_starts, "longest_document": one.input_ids.shape[1]} if ours else {}
        logits = causal_lm(input_ids=one.input_ids, use_cache=False, **more).logits[0]
        total = total + torch.nn.functional.cross_entropy(
            logits.double(), one.labels[0], ignore_index=IGNORE_INDEX, reduction="sum"
        )
    total.backward()  # type: ignore[no-untyped-call]
    return float(total.detach()), _take_gradients(causal_lm)


def plain_twin(causal_lm: Any) -> Any:
    """The same weights in transformers' own eager model."""
    config = copy.deepcopy(causal_lm.config)
    twin = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float64, attn_implementation="eager")
    twin.load_state_dict(causal_lm.state_dict())
    return twin.eval()


def worst_difference(found: tuple[float, Gradients], expected: tuple[float, Gradients]) -> float:
    """The largest relative difference of the loss and of any parameter's gradient.

    A gradient that is zero in theory (the bias of keys without rotary embedding) is compared with that of all.
    """
    assert found[1].keys() == expected[1].keys()
    differences = [abs(found[0] - expected[0]) / abs(expected[0])]
    norms = {name: float(gradient.norm()) for name, gradient in expected[1].items()}
    total = sum(norm**2 for norm in norms.values()) ** 0.5
    for name, gradient in expected[1].items():
        norm = norms[name] if norms[name] > 1e-10 * total else total
        differences.append(float((found[1][name] - gradient).norm()) / norm)
    return max(differences)

"""The small copy of each architecture has its structure, can be trained exactly, and all of it matters."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from apollo_sft.model import attention, load
from apollo_sft.model.proof import prove
from apollo_sft.model.sft_model import SftModel
from apollo_sft.tools.verify.oracle import oracle
from apollo_sft.tools.verify.small_copy import shrink, silent, write_model
from tests.support.samples import random_samples

VOCABULARY = 97
FAMILIES = [
    "Llama",
    "Qwen2",
    "Qwen3",
    "Mistral",
    "Gemma2",
    "Gemma3Text",
    "Phi3",
    "SmolLM3",
    "Granite",
    "Olmo2",
    "Qwen3Moe",
    "Mixtral",
    "GptOss",
    "Glm4",
    "DeepseekV3",
    "Cohere2",
    "Olmo3",
    "GPT2",
]
KEPT = (
    "num_attention_heads",
    "num_key_value_heads",
    "tie_word_embeddings",
    "attention_bias",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "logits_scaling",
    "embedding_multiplier",
    "hidden_act",
)


def full_size(family: str, **changes: Any) -> Any:
    """As in a model folder: the class's own defaults are those of a real model."""
    return getattr(transformers, f"{family}Config")(**changes)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_copy_is_small_alike_and_exact(family: str, tmp_path: Path) -> None:
    config = full_size(family)
    small = shrink(config, VOCABULARY)
    assert small.num_hidden_layers == 2 and small.vocab_size == VOCABULARY
    assert {name: getattr(small, name, None) for name in KEPT} == {name: getattr(config, name, None) for name in KEPT}

    assert write_model(small, tmp_path, seed=0) < 3_000_000
    read = load.read_config(tmp_path, trust_remote_code=False)
    load.check_architecture(read, trust_remote_code=False)
    attention.register(attention.sdpa_kernel)
    causal_lm = load.load_with_weights(tmp_path, read, torch.float64, trust_remote_code=False)
    prove(SftModel(causal_lm), seed=1)

    loss, gradients = oracle(causal_lm, random_samples(6, VOCABULARY))
    assert 1 < loss < 60
    total = float(torch.stack([gradient.norm() for gradient in gradients.values()]).norm())
    idle = [n for n, gradient in gradients.items() if not float(gradient.norm()) > 1e-7 * total]
    assert all("k_proj.bias" in name or "expert" in name or "bias" in name for name in idle), idle


def test_kinds_of_layers_are_both_there() -> None:
    gemma = full_size("Gemma3Text")
    assert gemma.layer_types[:2] == ["sliding_attention", "sliding_attention"]
    small = shrink(gemma, VOCABULARY)
    assert small.layer_types == ["sliding_attention", "full_attention"]
    assert small.sliding_window == 8
    assert shrink(full_size("SmolLM3"), VOCABULARY).no_rope_layers == [1, 0]


def test_heads_that_sequence_ranks_do_not_divide_stay() -> None:
    config = full_size("Llama", num_attention_heads=9, num_key_value_heads=3, hidden_size=576)
    small = shrink(config, VOCABULARY)
    assert (small.num_attention_heads, small.num_key_value_heads, small.hidden_size) == (9, 3, 72)


def test_a_head_width_of_its_own_stays_apart_from_the_hidden_size() -> None:
    small = shrink(full_size("Qwen3", num_attention_heads=16, hidden_size=1024, head_dim=128), VOCABULARY)
    assert small.hidden_size != small.num_attention_heads * small.head_dim


def test_factors_of_longrope_fit_the_narrow_heads() -> None:
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 4096}
    rope |= {"short_factor": [1.0 + i for i in range(48)], "long_factor": [2.0 + i for i in range(48)]}
    small = shrink(full_size("Phi3", rope_parameters=rope), VOCABULARY)
    assert small.rope_parameters["short_factor"] == [1.0, 13.0, 25.0, 37.0]
    assert len(small.rope_parameters["long_factor"]) == 4


def test_a_window_that_is_off_stays_off() -> None:
    assert shrink(full_size("Mistral", sliding_window=None), VOCABULARY).sliding_window is None


def test_nothing_random_is_left() -> None:
    config = full_size("Phi3", resid_pdrop=0.1, embd_pdrop=0.1, attention_dropout=0.1)
    assert {silent(config).resid_pdrop, config.embd_pdrop, config.attention_dropout} == {0.0}
    assert shrink(full_size("Mixtral", router_jitter_noise=0.1), VOCABULARY).router_jitter_noise == 0.0


def test_the_same_seed_gives_the_same_weights(tmp_path: Path) -> None:
    small = shrink(full_size("Qwen2"), VOCABULARY)
    for name in ("a", "b"):
        torch.rand(3)  # the state of the global generator does not matter
        write_model(small, tmp_path / name, seed=7)
    first, second = (Path(tmp_path / name / "model.safetensors").read_bytes() for name in ("a", "b"))
    assert first == second


def test_text_and_vision_are_both_shrunk() -> None:
    text = {"hidden_size": 640, "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256}
    config = transformers.Gemma3Config(text_config=text, vision_config={"num_hidden_layers": 6})
    small = shrink(config, VOCABULARY)
    assert small.text_config.num_hidden_layers == 2 and small.text_config.vocab_size == VOCABULARY
    assert small.vision_config.num_hidden_layers == 1 and small.vision_config.hidden_size == 16

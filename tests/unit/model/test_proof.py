"""The proof on loaded weights: what is exact passes, a leak and a head of its own are refused by name."""

import pytest
import torch
from torch import Tensor

from apollo_sft.errors import ModelError
from apollo_sft.model import attention
from apollo_sft.model.attention import AttentionOptions, Documents, sdpa_kernel
from apollo_sft.model.proof import prove
from apollo_sft.model.sft_model import SftModel
from tests.support.models import tiny_config, tiny_model

EXACT = {
    "Llama": {},
    "Qwen2": {},
    "Qwen3": {"head_dim": 8},
    "Mistral": {},
    "Gemma2": {"head_dim": 8},
    "Gemma3Text": {"head_dim": 8},
    "Phi3": {},
    "SmolLM3": {},
    "Granite": {"logits_scaling": 4.0},
    "Olmo2": {},
    "Cohere2": {},
    "GptOss": {"num_local_experts": 4, "head_dim": 8},
}


@pytest.fixture(autouse=True)
def _reference_attention() -> None:
    attention.register(sdpa_kernel)


@pytest.mark.parametrize("family", EXACT)
def test_exact_architectures_pass(family: str) -> None:
    config = tiny_config(family, **EXACT[family])
    prove(SftModel(tiny_model(config, torch.float32, attention.NAME)), seed=1)


def test_attention_across_documents_is_refused() -> None:
    def leaking(query: Tensor, key: Tensor, value: Tensor, documents: Documents, options: AttentionOptions) -> Tensor:
        whole = torch.tensor([0, query.shape[0]], dtype=torch.int32)
        return sdpa_kernel(query, key, value, Documents(whole, query.shape[0]), options)

    model = SftModel(tiny_model(tiny_config(), torch.float32, attention.NAME))
    attention.register(leaking)
    with pytest.raises(ModelError, match="Qwen2ForCausalLM cannot be trained exactly"):
        prove(model, seed=1)


def test_a_head_that_forms_its_logits_in_its_own_way_is_refused() -> None:
    causal_lm = tiny_model(tiny_config(), torch.float32, attention.NAME)
    causal_lm.lm_head.register_forward_hook(lambda module, args, logits: logits * 1.5)
    with pytest.raises(ModelError, match="logits are computed in another way"):
        prove(SftModel(causal_lm), seed=1)


def test_a_window_that_attention_is_not_told_of_is_refused() -> None:
    causal_lm = tiny_model(tiny_config("Gemma3Text", head_dim=8), torch.float32, attention.NAME)
    prove(SftModel(causal_lm), seed=1)
    causal_lm.model.layers[0].self_attn.sliding_window = causal_lm.model.layers[1].self_attn.sliding_window = None
    with pytest.raises(ModelError, match=r"does not pass this model.s sliding window to the attention function"):
        prove(SftModel(causal_lm), seed=1)


def test_attention_that_is_not_causal_is_refused_when_it_is_called() -> None:
    causal_lm = tiny_model(tiny_config(), torch.float32, attention.NAME)
    causal_lm.model.layers[1].self_attn.is_causal = False
    with pytest.raises(ModelError, match="is_causal=False"):
        prove(SftModel(causal_lm), seed=1)


def test_layers_that_hand_nothing_down_are_refused() -> None:
    with pytest.raises(ModelError, match="NemotronAttention does not receive the document starts"):
        prove(SftModel(tiny_model(tiny_config("Nemotron"), torch.float32, attention.NAME)), seed=1)

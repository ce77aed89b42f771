"""FLOPs by formula against torch's own counter on a real forward and backward."""

import torch
from torch.utils.flop_counter import FlopCounterMode

from apollo_sft.model.flops import cost_of
from tests.support.models import tiny_config, tiny_model

TOKENS = 24


def test_the_formula_counts_what_torch_counts() -> None:
    config = tiny_config("Llama", tie_word_embeddings=False)
    model = tiny_model(config, torch.float32)
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, TOKENS, dtype=torch.int64)).logits.sum().backward()
    heads = config.num_attention_heads * config.head_dim * config.num_hidden_layers
    unseen = 12 * heads * TOKENS * (TOKENS - 1) // 2  # written out, attention multiplies with masked keys too
    assert cost_of(model).of([TOKENS], TOKENS) + unseen == counter.get_total_flops()


def test_only_targets_pass_the_head_and_only_chosen_experts_count() -> None:
    experts = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8}
    config = tiny_config("Qwen3Moe", tie_word_embeddings=False, **experts)
    cost = cost_of(tiny_model(config, torch.float32))
    hidden, layers = config.hidden_size, config.num_hidden_layers
    attention = hidden * 8 * (4 + 2 + 2) + 8 * 4 * hidden
    assert cost.active == layers * (attention + hidden * 8 + 2 * 3 * hidden * 16)
    assert cost.of([10], 10) - cost.of([10], 0) == 10 * 6 * hidden * config.vocab_size

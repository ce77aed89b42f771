"""Rows of added tokens: the mean of the others, and nothing else changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from apollo_sft.model import attention, load
from apollo_sft.types import AddedTokens
from tests.support.models import save_tiny_model, tiny_config

NEW = AddedTokens(("<a>", "<b>"), (97, 98), known=97, held=97, rows=99)
FAMILIES: dict[str, dict[str, Any]] = {
    "GPT2": {"n_positions": 256},
    "Qwen2": {"tie_word_embeddings": False},
    "Phi": {"tie_word_embeddings": False},
}


def grown(base: Path, new_tokens: AddedTokens | None, dtype: torch.dtype) -> Any:
    attention.register(attention.sdpa_kernel)
    config = load.read_config(base, False)
    wanted = config if new_tokens is None else load.with_rows(config, new_tokens.rows)
    return load.load_with_weights(base, wanted, dtype, False, new_tokens)


def tables(model: Any) -> dict[int, Tensor]:
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    return {id(table): table for end in ends for table in end.parameters()}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_new_rows_are_the_mean_and_the_rest_is_as_it_was(tmp_path: Path, family: str, dtype: torch.dtype) -> None:
    base = save_tiny_model(tmp_path, tiny_config(family, **FAMILIES[family]), dtype)
    before = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    state = torch.get_rng_state()
    model = grown(base, NEW, torch.float32)
    assert torch.equal(torch.get_rng_state(), state)
    assert len(tables(model)) == {"GPT2": 1, "Qwen2": 2, "Phi": 3}[family]
    old = before.state_dict()
    resized = set()
    for name, found in model.state_dict().items():
        if found.shape != old[name].shape:
            resized.add(name)
            mean = old[name].double().mean(0).float()
            assert found.shape[0] == 99
            assert torch.equal(found[97], mean) and torch.equal(found[98], mean)
        assert torch.equal(found[: len(old[name])], old[name])
    names = {"lm_head.weight", *(name for name in old if name.endswith(("wte.weight", "embed_tokens.weight")))}
    assert resized == names | ({"lm_head.bias"} if family == "Phi" else set())
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    on_meta = load.build_on_meta(load.with_rows(load.read_config(base, False), 99), torch.float32, False)
    assert {name: tensor.shape for name, tensor in on_meta.state_dict().items()} == shapes


def test_rows_that_stood_for_nothing_are_used_before_any_is_added(tmp_path: Path) -> None:
    base = save_tiny_model(tmp_path, tiny_config("Qwen2", tie_word_embeddings=False))
    old = grown(base, None, torch.float32).state_dict()
    found = grown(base, AddedTokens(("<a>", "<b>"), (90, 91), known=90, held=97, rows=97), torch.float32).state_dict()
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        mean = old[name][:90].double().mean(0).float()
        assert torch.equal(found[name][[90, 91]], torch.stack([mean, mean]))
        others = [row for row in range(97) if row not in (90, 91)]
        assert torch.equal(found[name][others], old[name][others])

"""FSDP1 trains, saves and exports what FSDP2 does; a run may change between them."""

from pathlib import Path
from typing import Any

import pytest

from tests.support.exports import tiny_tokenizer
from tests.support.models import save_tiny_adapter, save_tiny_model, tiny_config
from tests.support.ranks import run_ranks
from tests.support.samples import random_samples, write_store

WORKER = Path(__file__).with_name("strategies_worker.py")
MODELS = ["tied", "lora"]
EXACT = 1e-12


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.long)])
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("strategies")
    save_tiny_model(folder / "tied", tiny_config("Qwen3", tie_word_embeddings=True, head_dim=8))
    save_tiny_model(folder / "lora", tiny_config("Llama"))  # its head is not tied
    save_tiny_adapter(folder / "lora")
    for name in ("tied", "lora"):
        tiny_tokenizer().save_pretrained(folder / name)
    write_store(folder / "store", random_samples(48))
    outcome: dict[str, Any] = run_ranks(WORKER, request.param, folder, str(folder), *MODELS)
    return outcome


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_same_steps(found: dict[str, Any], model: str, dtype: str) -> None:
    steps = found[model][dtype]
    fsdp2, fsdp = steps["figures"]
    losses = max(abs(one - other) / one for one, other in zip(fsdp2, fsdp, strict=True))
    print(f"\n{model}, {dtype}: losses and norms apart {losses:.1e}, weights {steps['weights']:.1e}")
    assert losses <= 1e-5
    assert steps["weights"] <= 1e-4
    assert model == "lora" or max(steps["gains"]) > 1e-3, "a gain that is decayed under one strategy would show"


@pytest.mark.parametrize("model", MODELS)
def test_a_run_changes_strategy_at_its_checkpoints(found: dict[str, Any], model: str) -> None:
    resumed = found[model]["resume"]
    assert len(resumed["same"]) > 10
    assert all(resumed["same"]), "what is loaded is what was saved, bit for bit"
    assert resumed["found"] == pytest.approx(resumed["expected"], rel=EXACT)
    assert resumed["weights"] <= EXACT


@pytest.mark.parametrize("model", MODELS)
def test_both_export_the_same_bytes(found: dict[str, Any], model: str) -> None:
    after_two, other_after_two, after_four, other_after_four = found[model]["resume"]["exports"]
    assert "model.safetensors" in after_two
    assert after_two == other_after_two
    assert after_four == other_after_four
    assert after_two["model.safetensors"] != after_four["model.safetensors"]


@pytest.mark.parametrize("how", ["offload", "offload, no_sync"])
def test_offload_adds_up_what_fsdp1_would_overwrite(found: dict[str, Any], how: str) -> None:
    figures = found[how]
    assert figures["micro_batches"] > 1
    assert max(figures["figures"], figures["gradients"], figures["validation"]) <= EXACT

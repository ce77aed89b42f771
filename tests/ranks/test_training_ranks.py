"""What sharded ranks hold, and what their steps and validations give, against one process written out."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from apollo_sft.model import attention, load
from apollo_sft.types import Sample
from tests.support.models import save_tiny_model, tiny_config
from tests.support.oracle import oracle_gradients, total_norm, worst_difference
from tests.support.ranks import run_ranks
from tests.support.samples import random_samples, write_store

WORKER = Path(__file__).with_name("training_worker.py")
BATCH, STEPS, RATE, CLIP = 8, 3, 1e-2, 0.1
BETAS, EPS, DECAY = (0.9, 0.95), 1e-8, 0.01


def samples() -> list[Sample]:
    return random_samples(BATCH * STEPS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    save_tiny_model(folder / "untied", tiny_config("Qwen2"))
    save_tiny_model(folder / "tied", tiny_config("Qwen3", tie_word_embeddings=True, head_dim=8))
    write_store(folder / "store", samples())
    for rows in range(1, 10):
        write_store(folder / f"rows{rows}", random_samples(rows + 1)[1:])
    return folder


@pytest.fixture(scope="module", params=[1, 2, pytest.param(4, marks=pytest.mark.long)])
def found(request: pytest.FixtureRequest, folder: Path) -> dict[str, Any]:
    outcome = run_ranks(WORKER, request.param, folder, str(folder))
    return outcome | {"weights": load_file(folder / f"clipped-{request.param}.safetensors")}


def adamw(weight: Tensor, gradient: Tensor, moments: list[Tensor], step: int) -> None:
    """Source: arXiv:1711.05101, algorithm 2, with the decay on matrices only."""
    for moment, beta, value in zip(moments, BETAS, (gradient, gradient**2), strict=True):
        moment.mul_(beta).add_((1 - beta) * value)
    mean, square = (moment / (1 - beta**step) for moment, beta in zip(moments, BETAS, strict=True))
    weight.mul_(1 - RATE * DECAY * (weight.dim() >= 2)).sub_(RATE * mean / (square.sqrt() + EPS))


@pytest.fixture(scope="module")
def written_out(folder: Path) -> tuple[dict[str, Tensor], list[float], list[float]]:
    """Weights after three clipped steps of one process, the losses, and the norms before clipping."""
    attention.register(attention.sdpa_kernel)
    base = folder / "untied"
    model = load.load_with_weights(base, load.read_config(base, False), torch.float64, False)
    moments = {name: [torch.zeros_like(p), torch.zeros_like(p)] for name, p in model.named_parameters()}
    losses, norms = [], []
    for step in range(STEPS):
        loss, gradients = oracle_gradients(model, samples()[step * BATCH : (step + 1) * BATCH])
        losses.append(loss)
        norms.append(total_norm(gradients))
        with torch.no_grad():
            for name, weight in model.named_parameters():
                shortened = gradients[name] * min(1.0, CLIP / (norms[-1] + 1e-6))
                adamw(weight, shortened, moments[name], step + 1)
    return {name: p.detach() for name, p in model.named_parameters()}, losses, norms


@pytest.mark.parametrize("name", ["tied", "untied"])
def test_the_shards_hold_the_source_bit_for_bit(found: dict[str, Any], name: str) -> None:
    filled = found[name]
    assert filled["names"]
    assert filled["buffers"] > 0
    assert filled["differ"] == filled["meta"] == []
    assert filled["dtypes"] == ["torch.float32"]
    assert filled["tied"] == (name == "tied")


def test_clipped_steps_give_the_weights_of_one_process(
    found: dict[str, Any], written_out: tuple[dict[str, Tensor], list[float], list[float]]
) -> None:
    weights, losses, norms = written_out
    assert min(norms) > 1.5 * CLIP, "every step must be clipped"
    assert found["clipped"]["losses"] == pytest.approx(losses, rel=1e-12)
    assert found["clipped"]["norms"] == pytest.approx(norms, rel=1e-12)
    worst = worst_difference(found["weights"], weights)
    print(f"\nweights after {STEPS} clipped steps: worst {worst:.1e}")
    assert worst <= 1e-12


def test_bf16_computes_and_fp32_remembers(found: dict[str, Any]) -> None:
    mixed, exact = found["mixed"], found["fp32"]
    assert mixed["dtypes"] == exact["dtypes"] == ["torch.float32"]
    assert mixed["losses"] == pytest.approx(exact["losses"], rel=5e-3)
    assert mixed["losses"] != pytest.approx(exact["losses"], rel=1e-6), "bf16 must have been used"
    assert mixed["moved"] > 0.99 * exact["moved"], "small updates are not lost"


def test_validation_is_the_token_mean_of_all_rows(found: dict[str, Any]) -> None:
    assert len(found["evaluations"]) == 36
    worst = 0.0
    for rows, size, loss, counted, expected, targets in found["evaluations"]:
        assert counted == targets, (rows, size)
        worst = max(worst, abs(loss - expected) / expected)
    print(f"\nvalidation: worst {worst:.1e}")
    assert worst <= 1e-12

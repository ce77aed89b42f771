"""One step of one process: normalisation, clipping, what is logged."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from apollo_sft.data.batch.loader import Loader, StepBatch
from apollo_sft.data.batch.plan import PlanSpec
from apollo_sft.errors import TrainingError
from apollo_sft.model import attention
from apollo_sft.model.sft_model import SftModel
from apollo_sft.parallel.consensus import Vote
from apollo_sft.parallel.launch import World
from apollo_sft.train.step import train_step
from apollo_sft.types import Sample
from tests.support.models import tiny_config, tiny_model
from tests.support.samples import random_samples, write_store

ALONE = World(0, 1, 0, torch.device("cpu"))


@pytest.fixture
def model() -> SftModel:
    attention.register(attention.sdpa_kernel)
    return SftModel(tiny_model(tiny_config("Llama"), attention=attention.NAME).train())


def batch_of(folder: Path, samples: list[Sample], micro_batch_size: int = 2) -> StepBatch:
    spec = PlanSpec(len(samples), micro_batch_size, 1, seed=1, shuffle=False)
    return Loader(write_store(folder, samples), spec, 0).batch(0)


def descent(model: SftModel, rate: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=rate)


def gradients(model: SftModel) -> dict[str, Any]:
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def test_doubling_every_row_changes_nothing(model: SftModel, tmp_path: Path) -> None:
    samples = random_samples(6)
    once = train_step(model, descent(model, 0.0), batch_of(tmp_path / "once", samples), ALONE, None)
    expected = gradients(model)
    twice = train_step(model, descent(model, 0.0), batch_of(tmp_path / "twice", samples * 2, 5), ALONE, None)
    assert (twice.loss, twice.grad_norm) == pytest.approx((once.loss, once.grad_norm), rel=1e-13)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-9, atol=1e-15)


def test_rows_without_a_target_change_nothing(model: SftModel, tmp_path: Path) -> None:
    samples = random_samples(11)
    trained = [sample for sample in samples if sample.num_targets]
    assert len(trained) < len(samples)
    some = train_step(model, descent(model, 0.0), batch_of(tmp_path / "some", samples, 1), ALONE, None)
    all_of_them = train_step(model, descent(model, 0.0), batch_of(tmp_path / "all", trained, 3), ALONE, None)
    assert some.loss == pytest.approx(all_of_them.loss, rel=1e-13)
    assert some.grad_norm == pytest.approx(all_of_them.grad_norm, rel=1e-13)


def test_the_norm_is_logged_before_clipping_and_the_step_is_as_long_as_the_clip(
    model: SftModel, tmp_path: Path
) -> None:
    batch = batch_of(tmp_path / "store", random_samples(6))
    norm = train_step(model, descent(model, 0.0), batch, ALONE, None).grad_norm
    before = [parameter.detach().clone() for parameter in model.parameters()]
    clipped = train_step(model, descent(model, 1.0), batch, ALONE, norm / 8)
    change = torch.stack([(p.detach() - old).norm() for p, old in zip(model.parameters(), before, strict=True)]).norm()
    assert clipped.grad_norm == norm
    assert float(change) == pytest.approx(norm / 8, rel=1e-4)


@pytest.mark.parametrize("clip", [None, 0, 1e9])
def test_no_clipping(model: SftModel, tmp_path: Path, clip: float | None) -> None:
    batch = batch_of(tmp_path / "store", random_samples(6))
    before = [parameter.detach().clone() for parameter in model.parameters()]
    norm = train_step(model, descent(model, 1.0), batch, ALONE, clip).grad_norm
    change = torch.stack([(p.detach() - old).norm() for p, old in zip(model.parameters(), before, strict=True)]).norm()
    assert float(change) == pytest.approx(norm, rel=1e-12)


def test_votes_are_passed_on(model: SftModel, tmp_path: Path) -> None:
    batch = batch_of(tmp_path / "store", random_samples(2))
    assert train_step(model, descent(model, 0.0), batch, ALONE, None).votes == Vote.NOTHING
    result = train_step(model, descent(model, 0.0), batch, ALONE, None, Vote.STOP | Vote.SAVE_DUE)
    assert result.votes == Vote.STOP | Vote.SAVE_DUE
    assert result.peak_bytes > 2**20


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_names_step_and_rows(model: SftModel, tmp_path: Path, value: float) -> None:
    samples = random_samples(6, vocab_size=90)
    samples[4].input_ids[0] = 95
    with torch.no_grad():
        model.causal_lm.get_input_embeddings().weight[95, 0] = value
    before = [parameter.detach().clone() for parameter in model.parameters()]
    batch = replace(batch_of(tmp_path / "store", samples), step=6)
    with pytest.raises(TrainingError, match=r"step 7: .*not finite") as raised:
        train_step(model, descent(model, 1.0), batch, ALONE, 1.0)
    assert "rows: rows row 4; rows row 5\n" in str(raised.value), "the micro-batch that they share"
    for parameter, old in zip(model.parameters(), before, strict=True):
        torch.testing.assert_close(parameter.detach(), old, rtol=0, atol=0, equal_nan=True)

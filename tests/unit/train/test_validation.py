"""Validation of one process."""

from pathlib import Path

import pytest
import torch

from apollo_sft.data.batch.loader import Loader
from apollo_sft.data.batch.plan import PlanSpec
from apollo_sft.model import attention
from apollo_sft.model.sft_model import SftModel
from apollo_sft.parallel.launch import World
from apollo_sft.train.validation import evaluate
from tests.support.models import tiny_config, tiny_model
from tests.support.oracle import oracle_loss
from tests.support.samples import random_samples, write_store


@pytest.mark.parametrize("micro_batch_size", [1, 3, 16])
def test_every_row_once_without_dropout_and_training_goes_on(tmp_path: Path, micro_batch_size: int) -> None:
    attention.register(attention.sdpa_kernel)
    causal_lm = tiny_model(tiny_config("Llama", attention_dropout=0.5), attention=attention.NAME).train()
    samples = random_samples(11)
    spec = PlanSpec(micro_batch_size, micro_batch_size, 1, seed=1, shuffle=False)
    loader = Loader(write_store(tmp_path / "store", samples), spec, 0)
    loss, targets, _ = evaluate(SftModel(causal_lm), loader, World(0, 1, 0, torch.device("cpu")))
    assert causal_lm.training
    assert all(parameter.grad is None for parameter in causal_lm.parameters())
    with torch.no_grad():
        total, expected = oracle_loss(causal_lm.eval(), samples)
    assert targets == expected
    assert loss == pytest.approx(float(total) / expected, rel=1e-13)

"""Runs on a CUDA device against the same run on the CPU, whose code they share."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.runs import series, train_here, write_inputs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
FP32 = "model.fsdp_config.dtype=fp32"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def on_cpu(inputs: Path) -> list[dict[str, Any]]:
    return train_here(inputs, inputs / "cpu", "trainer.total_training_steps=6", "trainer.save_freq=1000")


def test_adapted_experts_make_the_steps_of_the_cpu(tmp_path: Path) -> None:
    """Rank 3: rows of adapters that grouped products on CUDA do not take are padded."""
    experts = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 8}
    inputs = write_inputs(tmp_path, family="Qwen3Moe", **experts)
    keys = ["model.lora_rank=3", "trainer.total_training_steps=6", "trainer.save_freq=1000"]
    here = train_here(inputs, tmp_path / "cpu", *keys, "trainer.device=cpu")
    for dtype, bound in (("fp32", 1e-3), ("bf16", 5e-2)):
        more = [f"model.fsdp_config.dtype={dtype}", "trainer.device=cuda"]
        there = train_here(inputs, tmp_path / dtype, *keys, *more)
        assert series(there, "train/loss") == pytest.approx(series(here, "train/loss"), rel=bound)


@pytest.mark.parametrize("name", ["muon", "adamw_8bit"])
def test_optimizers_make_the_steps_of_the_cpu(inputs: Path, tmp_path: Path, name: str) -> None:
    keys = [FP32, f"optim.name={name}", "trainer.total_training_steps=6", "trainer.save_freq=3"]
    here, there = (
        series(train_here(inputs, tmp_path / device, *keys, f"trainer.device={device}"), "train/loss")
        for device in ("cpu", "cuda")
    )
    assert there == pytest.approx(here, rel=1e-3)


@pytest.mark.parametrize(
    ("more", "bound"),
    [
        ([FP32, "model.attn_implementation=sdpa"], 1e-4),
        ([FP32], 1e-4),
        ([], 3e-2),
        (["model.enable_gradient_checkpointing=true"], 3e-2),
        (["model.fsdp_config.cpu_offload=true"], 3e-2),
        (["trainer.save_freq=2"], 3e-2),
        ([FP32, "model.compile=true"], 1e-4),
    ],
    ids=[
        "fp32 sdpa",
        "fp32",
        "bf16",
        "checkpointing",
        "offload, pinned",
        "checkpoints with the device's generator",
        "compiled",
    ],
)
def test_losses_are_those_of_the_cpu(
    inputs: Path, on_cpu: list[dict[str, Any]], tmp_path: Path, more: list[str], bound: float
) -> None:
    keys = ["trainer.device=cuda", "trainer.total_training_steps=6", "trainer.save_freq=1000"]
    metrics = train_here(inputs, tmp_path / "out", *keys, *more)
    assert series(metrics, "train/loss") == pytest.approx(series(on_cpu, "train/loss"), rel=bound)
    assert min(series(metrics, "memory/peak_bytes")) > 0

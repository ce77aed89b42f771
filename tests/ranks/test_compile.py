"""Compiled layers make the same steps as plain ones, under the same names."""

import gc
from pathlib import Path
from typing import Any

import pytest
import torch

from apollo_sft.errors import ConfigError
from apollo_sft.model.compiled_layers import check_compile
from apollo_sft.parallel.launch import World
from tests.support.models import save_tiny_adapter, save_tiny_model, tiny_config
from tests.support.oracle import worst_difference
from tests.support.ranks import run_on_ranks
from tests.support.samples import random_samples, write_store
from tests.support.strategies import DOUBLE, Training

CPU = torch.device("cpu")
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "head_dim": 8}
SP = "ulysses_sequence_parallel_size=2"
BOUNDS = {DOUBLE: (1e-7, 1e-6), "model.fsdp_config.dtype=fp32": (1e-5, 1e-4)}
"""Of losses and norms, and of weights after AdamW, which divides by the size of each gradient: fused kernels round
elsewhere, no more. In float64, too, transformers computes norms and rotary embedding in float32."""


COMPILE = "model.compile=true"
CHECKPOINTING = "model.enable_gradient_checkpointing=true"


def cell(folder: Path, model: str, world: World, *more: str) -> dict[str, Any]:
    """Two steps of both, and what a checkpoint of each is called."""
    runs = [Training(folder, model, "fsdp2", world, *more, *keys) for keys in ((), (COMPILE,))]
    figures = [run.steps(0, 2) for run in runs]
    weights = [run.weights() for run in runs]
    return {
        "figures": max(abs(a - b) / a for a, b in zip(*figures, strict=True)),
        "weights": worst_difference(weights[1], weights[0]),
        "names": [sorted(run.state()) for run in runs],
    }


def cells_of(world: World, folder: Path, cells: list[str]) -> dict[str, Any]:
    """On every rank: the same steps with layers compiled and not."""
    found = {}
    for name in cells:
        model, *more = name.split()
        found[name] = cell(folder, model, world, *more)
        gc.collect()
    return found


def check(found: dict[str, Any], dtype: str) -> None:
    figures, weights = BOUNDS[dtype]
    print(f"\n{dtype}: losses and norms apart {found['figures']:.1e}, weights {found['weights']:.1e}")
    assert 0 < found["figures"] <= figures, "0: nothing was compiled"
    assert found["weights"] <= weights
    plain, compiled = found["names"]
    assert plain == compiled


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("compile")
    save_tiny_model(folder / "tied", tiny_config("Qwen3", tie_word_embeddings=True, head_dim=8))
    save_tiny_model(folder / "lora", tiny_config("Llama"))
    save_tiny_adapter(folder / "lora")
    save_tiny_model(folder / "experts", tiny_config("Qwen3Moe", **EXPERTS))
    save_tiny_adapter(folder / "experts", target_modules=["q_proj", "gate_proj", "up_proj", "down_proj"])
    write_store(folder / "store", random_samples(48))
    return folder


@pytest.mark.long
@pytest.mark.parametrize("dtype", BOUNDS)
def test_in_one_process(folder: Path, dtype: str) -> None:
    check(cell(folder, "tied", World(0, 1, 0, CPU), dtype), dtype)


CELLS = {
    2: [f"tied {DOUBLE}", f"tied {DOUBLE} {CHECKPOINTING}", f"lora {DOUBLE}", f"lora {DOUBLE} {SP}"],
    4: [f"tied {DOUBLE} {SP}"],
}
"""With four, two ranks share a copy of the weights: hybrid sharding."""


@pytest.mark.long
@pytest.mark.timeout(2000)
@pytest.mark.parametrize("ranks", CELLS)
def test_on_ranks(folder: Path, ranks: int) -> None:
    found = run_on_ranks(cells_of, ranks, folder, CELLS[ranks], seconds=1800)[0]
    for name in CELLS[ranks]:
        check(found[name], DOUBLE)


@pytest.mark.long
def test_adapted_experts(folder: Path) -> None:
    single = "model.fsdp_config.dtype=fp32"
    check(cell(folder, "experts", World(0, 1, 0, CPU), single), single)


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ConfigError, match="the compiler no-such-compiler not found"):
        check_compile(CPU, "fsdp2")
    monkeypatch.setenv("CXX", "true")
    check_compile(CPU, "fsdp2")
    with pytest.raises(ConfigError, match="FSDP1"):
        check_compile(CPU, "fsdp")

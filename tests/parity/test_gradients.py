"""Loss, gradient norm and every gradient of a step are those of one document at a time, however the step is split."""

import gc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.optim import Optimizer
from transformers import AutoModelForCausalLM

from apollo_sft.config.compose import compose
from apollo_sft.config.schema import SftConfig
from apollo_sft.data.batch.loader import Loader
from apollo_sft.data.store.store_files import SampleStore
from apollo_sft.model import attention, load
from apollo_sft.model.sft_model import SftModel
from apollo_sft.parallel.launch import World
from apollo_sft.parallel.mesh import Mesh, build_mesh
from apollo_sft.tools.verify.oracle import StaysDouble
from apollo_sft.train.assemble import assemble
from apollo_sft.train.loaders import plan_spec
from apollo_sft.train.step import train_step
from apollo_sft.types import IGNORE_INDEX, Sample
from tests.support.models import save_tiny_model, tiny_config
from tests.support.oracle import oracle_gradients, total_norm, whole, worst_difference
from tests.support.ranks import run_on_ranks
from tests.support.samples import random_samples, write_store

EXACT, EAGER = 1e-12, 1e-6
"""transformers computes norms and the softmax of eager attention in float32, whatever the weights."""

MHA, MQA, TIED = {"num_key_value_heads": 4}, {"num_key_value_heads": 1}, {"tie_word_embeddings": True}
MODELS = {
    "qwen2-gqa": ("Qwen2", {}),
    "qwen2-mha-tied": ("Qwen2", MHA | TIED),
    "llama-mqa": ("Llama", MQA),
    "llama-gqa-tied": ("Llama", TIED),
    "qwen2-window": ("Qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
}
MORE = {
    "qwen2-mqa": ("Qwen2", MQA),
    "qwen2-mqa-tied": ("Qwen2", MQA | TIED),
    "qwen2-gqa-tied": ("Qwen2", TIED),
    "qwen2-mha": ("Qwen2", MHA),
    "llama-gqa": ("Llama", {}),
    "llama-mha": ("Llama", MHA),
    "llama-mha-tied": ("Llama", MHA | TIED),
    "llama-mqa-tied": ("Llama", MQA | TIED),
    "mistral-window-tied": ("Mistral", {"sliding_window": 5} | TIED),
}
SIZES = [1, 2, 3, 8]
Cells = list[list[Any]]
"""Of one model: (micro-batch sizes, gradient checkpointing)."""

COVERING: dict[int, dict[str, Cells]] = {
    1: {
        "qwen2-gqa": [[SIZES, False], [[3], True]],
        "qwen2-mha-tied": [[[1, 3], False]],
        "llama-mqa": [[[2, 8], False]],
        "llama-gqa-tied": [[[2], False], [[2], True]],
        "qwen2-window": [[[3, 8], False]],
    },
    2: {
        "qwen2-gqa": [[[1, 8], False], [[8], True]],
        "qwen2-mha-tied": [[[2, 3], False], [[2], True]],
        "llama-mqa": [[[1], False]],
        "llama-gqa-tied": [[[8], False]],
        "qwen2-window": [[[3], False]],
    },
    4: {
        "qwen2-gqa": [[[3], False]],
        "qwen2-mha-tied": [[[1, 8], False], [[8], True]],
        "llama-mqa": [[[2], False]],
    },
}


def steps() -> list[Sample]:
    """16 rows, every fifth without a target; 16 of which the first eight have none; a last step of three.

    So with 2 and 4 ranks some have no target, and with 4 ranks one has no row at the last step.
    """
    mixed = random_samples(27)
    silent = [replace(sample, labels=np.full_like(sample.labels, IGNORE_INDEX)) for sample in mixed[:8]]
    return [*mixed[:16], *silent, *mixed[16:]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gradients")
    write_store(folder / "store", steps())
    return folder


def model_folder(folder: Path, name: str) -> Path:
    """A model, and what the oracle gives for each step of it, on any number of processes."""
    place = folder / name
    if place.exists():
        return place

    family, changes = (MODELS | MORE)[name]
    save_tiny_model(place, tiny_config(family, **changes))
    attention.register(attention.sdpa_kernel)
    plain = load.load_with_weights(place, load.read_config(place, False), torch.float64, False)
    rows = steps()
    expected = [oracle_gradients(plain, rows[first : first + BATCH]) for first in range(0, len(rows), BATCH)]
    torch.save(expected, place / EXPECTED)
    return place


BATCH = 16
EXPECTED = "expected.pt"
"""The file in a model's folder with what the oracle gives."""


def config_of(base: Path, micro_batch_size: int, checkpointing: bool) -> SftConfig:
    keys = [f"model.partial_pretrain={base}", "data.train_files=none", "data.val_files=null"]
    keys += [f"data.train_batch_size={BATCH}", f"data.micro_batch_size_per_gpu={micro_batch_size}"]
    keys += [f"model.enable_gradient_checkpointing={checkpointing}", "model.fsdp_config.model_dtype=fp64"]
    return compose(keys).config


class OfModel:
    """All cells of one model folder. The rate is 0, so that a model serves for many steps."""

    def __init__(self, base: Path, store: SampleStore, world: World, mesh: Mesh) -> None:
        self.base, self.store, self.world, self.mesh = base, store, world, mesh
        self.hf_config = load.read_config(base, False)
        self.rows = [list(range(first, min(first + BATCH, len(store)))) for first in range(0, len(store), BATCH)]
        self.expected = torch.load(base / EXPECTED)  # noqa: TID251  # this test has written it

    def samples(self, step: int) -> list[Any]:
        return [self.store[i] for i in self.rows[step]]

    def run(self, micro_batch_sizes: list[int], checkpointing: bool) -> list[dict[str, Any]]:
        configs = [config_of(self.base, size, checkpointing) for size in micro_batch_sizes]
        model, optimizer = assemble(configs[0], self.base, self.hf_config, self.world, self.mesh)
        for group in optimizer.param_groups:
            group["lr"] = 0.0
        every_step = range(len(self.rows))
        return [self.cell(model, optimizer, config, step) for config in configs for step in every_step]

    def cell(self, model: SftModel, optimizer: Optimizer, config: SftConfig, step: int) -> dict[str, Any]:
        spec = replace(plan_spec(config.data, config.trainer.seed, self.mesh, self.hf_config), shuffle=False)
        batch = Loader(self.store, spec, self.mesh.dp_rank).batch(step)
        loss, gradients = self.expected[step]
        result = train_step(model, optimizer, batch, self.world, None)
        found = {name: whole(p.grad) for name, p in model.causal_lm.named_parameters()}
        norm = total_norm(gradients)
        samples = self.samples(step)
        return {
            "cell": f"{self.base.name} micro-batch {spec.micro_batch_size} step {step} "
            f"checkpointing {config.model.enable_gradient_checkpointing}",
            "worst": worst_difference(found, gradients),
            "loss": abs(result.loss - loss) / loss,
            "norm": abs(result.grad_norm - norm) / norm,
            "counts": [batch.num_targets, batch.num_tokens, batch.num_samples],
            "expected_counts": [
                sum(sample.num_targets for sample in samples),
                sum(len(sample.input_ids) for sample in samples),
                len(samples),
            ],
            "my_targets": sum(micro_batch.num_targets for micro_batch in batch.micro_batches),
            "logged": result.loss,
        }


def run_cells(world: World, folder: Path, models: dict[str, list[list[Any]]]) -> list[dict[str, Any]]:
    """On every rank. `models`: name of a model folder -> (micro-batch sizes, gradient checkpointing) of its cells."""
    mesh = build_mesh(world, 1)
    store = SampleStore(folder / "store")
    figures = []
    for name, wanted in models.items():
        cells = OfModel(folder / name, store, world, mesh)
        for micro_batch_sizes, checkpointing in wanted:
            figures += cells.run(micro_batch_sizes, checkpointing)
            gc.collect()
    return figures


def check(processes: int, models: dict[str, Cells], folder: Path, note: Callable[[str], None]) -> None:
    for name in models:
        model_folder(folder, name)
    if processes == 1:
        cells = run_cells(World(0, 1, 0, torch.device("cpu")), folder, models)
    else:
        cells = run_on_ranks(run_cells, processes, folder, models)[0]
    assert len(cells) == 3 * sum(len(sizes) for wanted in models.values() for sizes, _ in wanted)
    figures = [(max(cell["worst"], cell["loss"], cell["norm"]), cell["cell"]) for cell in cells]
    note(f"{processes} processes, {len(cells)} steps: worst {max(figures)[0]:.1e} ({max(figures)[1]})")
    assert [figure for figure in figures if not figure[0] <= EXACT] == []
    assert [cell for cell in cells if cell["counts"] != cell["expected_counts"]] == []
    if processes > 1:
        assert {cell["my_targets"] for cell in cells if "step 1" in cell["cell"]} == {0}, "rank 0 has no target there"
    check_same_loss(cells)


def check_same_loss(cells: list[dict[str, Any]]) -> None:
    """Gradient checkpointing does not change the loss by a bit."""
    logged = {cell["cell"]: cell["logged"] for cell in cells}
    pairs = [(name, name.replace("True", "False")) for name in logged if name.endswith("True")]
    assert pairs
    assert [pair for pair in pairs if logged[pair[0]] != logged[pair[1]]] == []


@pytest.mark.parametrize("processes", COVERING)
def test_every_gradient(processes: int, folder: Path, note: Callable[[str], None]) -> None:
    check(processes, COVERING[processes], folder, note)


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("processes", [1, 2, 4])
def test_every_gradient_of_all_models(processes: int, folder: Path, note: Callable[[str], None]) -> None:
    check(processes, {name: [[SIZES, False], [SIZES, True]] for name in MODELS | MORE}, folder, note)


def test_the_oracle_is_plain_transformers(folder: Path, note: Callable[[str], None]) -> None:
    """Our attention function against the eager one: exact where nothing is cast to float32, else to its rounding."""
    attention.register(attention.sdpa_kernel)
    worst = {"exact": 0.0, "eager": 0.0}
    rows = steps()[:8]
    for name in MODELS:
        place = model_folder(folder, name)
        ours = load.load_with_weights(place, load.read_config(place, False), torch.float64, False)
        plain = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float64, attn_implementation="eager")
        with StaysDouble():
            (loss, expected), (other, found) = (oracle_gradients(model, rows) for model in (ours, plain))
        worst["exact"] = max(worst["exact"], abs(other - loss) / loss, worst_difference(found, expected))
        (loss, expected), (other, found) = (oracle_gradients(model, rows) for model in (ours, plain))
        apart = total_norm({n: found[n] - expected[n] for n in expected}) / total_norm(expected)
        worst["eager"] = max(worst["eager"], abs(other - loss) / loss, apart)
    note(f"plain transformers, eager: worst {worst['eager']:.1e}; all in float64: worst {worst['exact']:.1e}")
    assert worst["eager"] <= EAGER
    assert worst["exact"] <= EXACT

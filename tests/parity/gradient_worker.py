"""One process of `test_gradients`: steps of every kind as a run makes them, against the oracle. Rank 0 writes."""

import gc
import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch.optim import Optimizer

from apollo_sft.config.compose import compose
from apollo_sft.config.schema import SftConfig
from apollo_sft.data.batch.loader import Loader
from apollo_sft.data.store.store_files import SampleStore
from apollo_sft.model import attention, load
from apollo_sft.model.sft_model import SftModel
from apollo_sft.parallel import launch
from apollo_sft.parallel.launch import World
from apollo_sft.parallel.mesh import Mesh, build_mesh
from apollo_sft.train.assemble import assemble
from apollo_sft.train.loaders import plan_spec
from apollo_sft.train.step import train_step
from tests.support.oracle import oracle_gradients, total_norm, whole, worst_difference

BATCH = 16


def config_of(base: Path, micro_batch_size: int, checkpointing: bool) -> SftConfig:
    keys = [f"model.partial_pretrain={base}", "data.train_files=none", "data.val_files=null"]
    keys += [f"data.train_batch_size={BATCH}", f"data.micro_batch_size_per_gpu={micro_batch_size}"]
    keys += [f"model.enable_gradient_checkpointing={checkpointing}", "model.fsdp_config.model_dtype=fp64"]
    return compose(keys).config


class Cells:
    """All cells of one model folder. The rate is 0, so that a model serves for many steps."""

    def __init__(self, base: Path, store: SampleStore, world: World, mesh: Mesh) -> None:
        self.base, self.store, self.world, self.mesh = base, store, world, mesh
        self.hf_config = load.read_config(base, False)
        self.rows = [list(range(first, min(first + BATCH, len(store)))) for first in range(0, len(store), BATCH)]
        attention.register(attention.sdpa_kernel)
        plain = load.load_with_weights(base, self.hf_config, torch.float64, False)
        self.expected = [oracle_gradients(plain, self.samples(step)) for step in range(len(self.rows))]

    def samples(self, step: int) -> list[Any]:
        return [self.store[i] for i in self.rows[step]]

    def run(self, micro_batch_sizes: list[int], checkpointing: bool) -> list[dict[str, Any]]:
        config = config_of(self.base, 1, checkpointing)
        model, optimizer = assemble(config, self.base, self.hf_config, self.world, self.mesh)
        for group in optimizer.param_groups:
            group["lr"] = 0.0
        return [
            self.cell(model, optimizer, config_of(self.base, size, checkpointing), step)
            for size in micro_batch_sizes
            for step in range(len(self.rows))
        ]

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


def run_cells(folder: Path, models: dict[str, list[list[Any]]], world: World) -> list[dict[str, Any]]:
    """`models`: name of a model folder -> (micro-batch sizes, gradient checkpointing) of its cells."""
    mesh = build_mesh(world, 1)
    store = SampleStore(folder / "store")
    figures = []
    for name, wanted in models.items():
        cells = Cells(folder / name, store, world, mesh)
        for micro_batch_sizes, checkpointing in wanted:
            figures += cells.run(micro_batch_sizes, checkpointing)
            gc.collect()
    return figures


def main(out: Path, folder: Path, models: dict[str, list[list[Any]]]) -> None:
    world = launch.start("cpu", needs_group=False)
    figures = run_cells(folder, models, world)
    if world.is_main:
        out.write_text(json.dumps(figures))
    gc.collect()
    launch.stop()
    os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), json.loads(Path(sys.argv[3]).read_text()))

"""One process of `test_layouts`: every cell of the grid against the oracle, in fp64. Rank 0 writes the figures."""

import functools
import gc
import json
import os
import sys
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from apollo_sft.config.compose import compose
from apollo_sft.config.schema import SftConfig
from apollo_sft.data.batch.loader import Loader
from apollo_sft.data.store.store_files import SampleStore
from apollo_sft.model import attention, experts, load, lora
from apollo_sft.parallel import launch
from apollo_sft.parallel.launch import World
from apollo_sft.parallel.mesh import build_mesh
from apollo_sft.tools.verify.oracle import differences, oracle
from apollo_sft.train.assemble import assemble, needs_group
from apollo_sft.train.loaders import plan_spec
from apollo_sft.train.step import train_step
from apollo_sft.train.strategy import strategy_of
from tests.parity.layout_grid import NO_SYNC
from tests.support.oracle import total_norm, whole


@dataclass(frozen=True)
class Expected:
    """What the oracle says of one step of the whole store."""

    loss: float
    norm: float
    gradients: dict[str, torch.Tensor]
    counts: list[int]


def config_of(base: Path, store: SampleStore, overrides: list[str]) -> SftConfig:
    fixed = [f"model.partial_pretrain={base}", "data.train_files=none", "data.val_files=null"]
    fixed += [f"data.train_batch_size={len(store)}", "model.fsdp_config.model_dtype=fp64"]
    return compose([*fixed, *overrides]).config


def ask_oracle(base: Path, store: SampleStore) -> Expected:
    attention.register(attention.sdpa_kernel)
    model = load.load_with_weights(base, load.read_config(base, False), torch.float64, False)
    if (base / "adapter").exists():
        config = config_of(base, store, [f"model.lora_adapter_path={base / 'adapter'}"]).model
        lora.inject(model, lora.lora_config(config, base.name), torch.float64, str(base / "adapter"))
        for _, outermost in experts.wrapped(model):
            del outermost.forward  # PEFT's own, which adds B A to all experts
    samples = [store[i] for i in range(len(store))]
    loss, gradients = oracle(model, samples)
    counts = [sum(s.num_targets for s in samples), sum(len(s.input_ids) for s in samples), len(samples)]
    return Expected(loss, total_norm(gradients), {name: g.clone() for name, g in gradients.items()}, counts)


mesh_of = functools.cache(build_mesh)
"""Each mesh has threads of its own until the process ends: hundreds of cells share a few."""


def forget_meshes() -> None:
    """Before the process group ends: one that is held on to may abort the process."""
    mesh_of.cache_clear()
    gc.collect()


class Laid:
    """A model under one layout. The rate is 0, so that it serves for many ways to cut the step."""

    def __init__(self, base: Path, store: SampleStore, overrides: list[str], world: World) -> None:
        config = config_of(base, store, overrides)
        self.base, self.store, self.world = base, store, world
        self.mesh = mesh_of(world, config.ulysses_sequence_parallel_size, config.model.fsdp_config.fsdp_size)
        self.hf_config = load.read_config(base, False)
        self.model, self.optimizer = assemble(config, base, self.hf_config, world, self.mesh)
        for group in self.optimizer.param_groups:
            group["lr"] = 0.0

    def figures(self, overrides: list[str], expected: Expected) -> list[float]:
        """Relative differences of the worst gradient, the loss and the norm."""
        config = config_of(self.base, self.store, overrides)
        self.model.reduces_once = config.model.fsdp_config.use_no_sync_for_gradient_accumulation
        spec = plan_spec(config.data, config.trainer.seed, self.mesh, self.hf_config)
        batch = Loader(self.store, spec, self.mesh.dp_rank, self.mesh.sp_size).batch(0)
        result = train_step(self.model, self.optimizer, batch, self.world, None)
        assert [batch.num_targets, batch.num_tokens, batch.num_samples] == expected.counts
        named = strategy_of(self.model).by_rows(self.model, gradients=True).causal_lm.named_parameters()
        found = {name: whole(p.grad) for name, p in named if p.requires_grad}
        assert found.keys() == expected.gradients.keys()
        worst = max(difference for _, difference in differences(iter(found.items()), expected.gradients))
        loss, norm = (abs(a - b) / b for a, b in ((result.loss, expected.loss), (result.grad_norm, expected.norm)))
        return [worst, loss, norm]


def of_the_step(override: str) -> bool:
    """Whether the same assembled model serves with and without it."""
    return override.startswith("data.") or override == NO_SYNC


def assembly(overrides: list[str]) -> list[str]:
    return [override for override in overrides if not of_the_step(override)]


def main(out: Path, folder: Path, cells: dict[str, list[list[str]]]) -> None:
    """`cells`: name of a model folder -> the overrides of each of its cells."""
    world = launch.start("cpu", needs_group=False)
    store = SampleStore(folder / "store")
    figures: list[Any] = []
    for name, wanted in cells.items():
        base = folder / name
        expected = ask_oracle(base, store)
        adapter = [f"model.lora_adapter_path={base / 'adapter'}"] if (base / "adapter").exists() else []
        for shared, group in groupby(sorted(wanted, key=assembly), key=assembly):
            if world.size == 1:
                forget_meshes()
                launch.stop()
                world = launch.start("cpu", needs_group(config_of(base, store, shared).model, on_cuda=False))
            laid = Laid(base, store, [*shared, *adapter], world)
            figures += [[name, cell, *laid.figures([*cell, *adapter], expected)] for cell in group]
            del laid
            gc.collect()
            if world.is_main:
                out.write_text(json.dumps(figures))  # as they come: the long grid can be watched
    forget_meshes()
    launch.stop()
    os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), json.loads(Path(sys.argv[3]).read_text()))

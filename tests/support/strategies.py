"""A model and its optimizer, trained step by step under a strategy, with checkpoints and exports of it."""

import functools
import hashlib
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from apollo_sft.checkpoint.model_folder.rounding import cast
from apollo_sft.checkpoint.model_folder.write import save_model
from apollo_sft.checkpoint.run_folder.resume import folder_of
from apollo_sft.checkpoint.run_folder.state import snapshot
from apollo_sft.config.compose import compose
from apollo_sft.config.schema import SftConfig
from apollo_sft.data.batch.loader import Loader
from apollo_sft.data.store.store_files import SampleStore
from apollo_sft.model import load
from apollo_sft.model.lora import merge
from apollo_sft.parallel.launch import World
from apollo_sft.parallel.mesh import build_mesh
from apollo_sft.train.assemble import assemble
from apollo_sft.train.checkpoints import Checkpoints
from apollo_sft.train.loaders import plan_spec
from apollo_sft.train.step import train_step
from apollo_sft.train.strategy import strategy_of
from tests.support.exports import open_base, options
from tests.support.oracle import whole

BATCH, STEPS = 8, 3
DECAY = "optim.weight_decay=0.5"  # so large that a gain which is decayed shows
DOUBLE = "model.fsdp_config.model_dtype=fp64"


@functools.cache
def config_of(keys: tuple[str, ...]) -> SftConfig:
    """The config of a training. Several trainings of a test have the same keys."""
    return compose(keys).config


class Training:
    """A model and its optimizer under one strategy, on `folder / model`."""

    def __init__(self, folder: Path, model: str, strategy: str, world: World, *more: str) -> None:
        self.base, self.world = folder / model, world
        out = folder / f"run-{model}-{world.size}"
        keys = [f"model.partial_pretrain={self.base}", "data.train_files=none", "data.val_files=null"]
        keys += [f"data.train_batch_size={BATCH}", "optim.lr=1e-3", DECAY]
        keys += [f"data.micro_batch_size_per_gpu={BATCH // (2 * world.size)}"]  # so that gradients of two are added up
        keys += [f"model.lora_adapter_path={self.base / 'adapter'}"] if (self.base / "adapter").exists() else []
        keys += ["model.fsdp_config.fsdp_size=2"] if world.size > 2 else []
        keys += [f"trainer.default_local_dir={out}", f"model.strategy={strategy}", *more]
        config = config_of(tuple(keys))
        self.clip = config.optim.clip_grad
        self.mesh = build_mesh(world, config.ulysses_sequence_parallel_size, config.model.fsdp_config.fsdp_size)
        hf_config = load.read_config(self.base, False)
        torch.manual_seed(0)
        self.model, self.optimizer = assemble(config, self.base, hf_config, world, self.mesh)
        spec = replace(plan_spec(config.data, config.trainer.seed, self.mesh, hf_config), shuffle=False)
        self.loader = Loader(SampleStore(folder / "store"), spec, self.mesh.dp_rank, self.mesh.sp_size)
        facts = {"processes": world.size, "data": "d", "config": {}}
        self.checkpoints = Checkpoints(config.trainer, STEPS, STEPS, facts, world.is_main, None)
        self.checkpoints.begin(None, self.model, self.optimizer)

    def steps(self, first: int, last: int) -> list[float]:
        """Losses and norms of these steps, which are trained."""
        batches = [self.loader.batch(step) for step in range(first, last)]
        results = [train_step(self.model, self.optimizer, batch, self.world, self.clip) for batch in batches]
        return [figure for result in results for figure in (result.loss, result.grad_norm)]

    def save(self, step: int) -> None:
        self.checkpoints.save(step, self.model, self.optimizer, False, False)
        self.checkpoints.wait_for_save()

    def go_on(self, step: int) -> None:
        assert self.checkpoints.begin(folder_of(self.checkpoints.folder, step), self.model, self.optimizer) == step

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint holds, put together."""
        strategy = strategy_of(self.model)
        rows = strategy.as_row_sharded(self.model)
        moments = strategy.optimizer_as_row_sharded(self.model, rows, self.optimizer)
        return {name: whole(t) for name, t in snapshot(rows, moments, ["model", "optimizer"], copy=False).items()}

    def weights(self) -> dict[str, Tensor]:
        rows = strategy_of(self.model).as_row_sharded(self.model)
        return {name: whole(p.detach()).clone() for name, p in rows.named_parameters() if p.requires_grad}

    def gradients(self) -> dict[str, Tensor]:
        rows = strategy_of(self.model).as_row_sharded(self.model, gradients=True)
        return {name: whole(p.grad) for name, p in rows.named_parameters() if p.requires_grad}

    def export(self, out: Path) -> dict[str, str]:
        """Merged where there is an adapter; name and hash of every file."""
        rows = strategy_of(self.model).as_row_sharded(self.model)
        if self.base.name == "lora":
            merge(rows.causal_lm, cast)
        save_model(rows.causal_lm, open_base(self.base), out, options(), self.world.is_main)
        return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(out.glob("*.*"))}

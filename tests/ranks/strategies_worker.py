"""One process of `test_strategies`: the same steps, checkpoints and exports under FSDP2 and FSDP1. Rank 0 writes."""

import gc
import hashlib
import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import Tensor
from torch.distributed.fsdp import CPUOffload
from torch.distributed.fsdp._flat_param import FlatParamHandle

from apollo_sft.checkpoint.model_folder.rounding import cast
from apollo_sft.checkpoint.model_folder.write import save_model
from apollo_sft.checkpoint.run_folder.resume import folder_of
from apollo_sft.checkpoint.run_folder.state import snapshot
from apollo_sft.config.compose import compose
from apollo_sft.data.batch.loader import Loader
from apollo_sft.data.store.store_files import SampleStore
from apollo_sft.model import load
from apollo_sft.model.lora import merge
from apollo_sft.parallel import fsdp1, launch
from apollo_sft.parallel.launch import World
from apollo_sft.parallel.mesh import build_mesh
from apollo_sft.train.assemble import assemble
from apollo_sft.train.checkpoints import Checkpoints
from apollo_sft.train.loaders import plan_spec
from apollo_sft.train.step import train_step
from apollo_sft.train.strategy import strategy_of
from apollo_sft.train.validation import evaluate
from tests.support.exports import open_base, options
from tests.support.oracle import whole, worst_difference

BATCH, STEPS = 8, 6
prepare = FlatParamHandle.prepare_gradient_for_backward
DECAY = "optim.weight_decay=0.5"  # so large that a gain which is decayed shows
DOUBLE = "model.fsdp_config.model_dtype=fp64"


class Training:
    """A model and its optimizer under one strategy, on `folder / model`."""

    def __init__(self, folder: Path, model: str, strategy: str, world: World, *more: str) -> None:
        self.base, self.world = folder / model, world
        out = folder / f"run-{model}-{world.size}"
        keys = [f"model.partial_pretrain={self.base}", "data.train_files=none", "data.val_files=null"]
        keys += [f"data.train_batch_size={BATCH}", "data.micro_batch_size_per_gpu=1", "optim.lr=1e-3", DECAY]
        keys += [f"model.lora_adapter_path={self.base / 'adapter'}"] if (self.base / "adapter").exists() else []
        keys += ["model.fsdp_config.fsdp_size=2"] if world.size > 2 else []
        keys += [f"trainer.default_local_dir={out}", f"model.strategy={strategy}", *more]
        config = compose(keys).config
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
        rows = strategy.by_rows(self.model)
        moments = strategy.optimizer_by_rows(self.model, rows, self.optimizer)
        return {name: whole(t) for name, t in snapshot(rows, moments, ["model", "optimizer"], copy=False).items()}

    def weights(self) -> dict[str, Tensor]:
        rows = strategy_of(self.model).by_rows(self.model)
        return {name: whole(p.detach()).clone() for name, p in rows.named_parameters() if p.requires_grad}

    def gradients(self) -> dict[str, Tensor]:
        rows = strategy_of(self.model).by_rows(self.model, gradients=True)
        return {name: whole(p.grad) for name, p in rows.named_parameters() if p.requires_grad}

    def export(self, out: Path) -> dict[str, str]:
        """Merged where there is an adapter; name and hash of every file."""
        rows = strategy_of(self.model).by_rows(self.model)
        if self.base.name == "lora":
            merge(rows.causal_lm, cast)
        save_model(rows.causal_lm, open_base(self.base), out, options(), self.world.is_main)
        return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(out.glob("*.*"))}


def trajectory(folder: Path, model: str, world: World, *more: str) -> dict[str, Any]:
    """The same steps under both, with weights in fp32."""
    runs = [Training(folder, model, strategy, world, *more) for strategy in ("fsdp2", "fsdp")]
    start = runs[0].weights()
    figures = [run.steps(0, STEPS) for run in runs]
    weights = [run.weights() for run in runs]
    gains = [name for name, weight in start.items() if weight.dim() < 2]
    return {
        "figures": figures,
        "weights": worst_difference(weights[1], weights[0]),
        "gains": [float((weights[0][name] - start[name]).norm() / start[name].norm()) for name in gains],
    }


def exported(folder: Path, model: str, strategy: str, step: int, world: World) -> dict[str, str]:
    run = Training(folder, model, strategy, world, DOUBLE)
    run.go_on(step)
    return run.export(folder / f"export-{model}-{world.size}-{step}-{strategy}")


def there_and_back(folder: Path, model: str, world: World) -> dict[str, Any]:
    """fsdp2, fsdp, fsdp2 in turn, two steps each, in fp64, against six steps in one piece. What is loaded was saved."""
    one = Training(folder, model, "fsdp2", world, DOUBLE)
    expected = one.steps(0, STEPS)
    found: list[float] = []
    saved: dict[str, Tensor] = {}
    same: list[bool] = []
    exports = []
    for first, strategy in ((0, "fsdp2"), (2, "fsdp"), (4, "fsdp2")):
        run = Training(folder, model, strategy, world, DOUBLE)
        if first:
            run.go_on(first)
            loaded = run.state()
            same += [saved.keys() == loaded.keys(), *(torch.equal(saved[name], t) for name, t in loaded.items())]
            for name in ("fsdp2", "fsdp"):
                exports.append(exported(folder, model, name, first, world))
        found += run.steps(first, first + 2)
        run.save(first + 2)
        saved = run.state()
    return {
        "expected": expected,
        "found": found,
        "weights": worst_difference(saved, one.state()),
        "same": same,
        "exports": exports,
    }


def overwrite(self: FlatParamHandle) -> None:
    """On CUDA, a gradient that was moved to the CPU is not added to. Source: `prepare_gradient_for_backward`."""
    grad = self.flat_param.grad
    if grad is not None and grad.shape == self.flat_param._local_shard.shape:
        self.flat_param.grad = None
    prepare(self)


def offload(folder: Path, world: World, *more: str) -> dict[str, float]:
    """FSDP1's own offload, which overwrites reduced gradients, against training without: gradients and a validation.

    It is written for CUDA: a CPU has no pinned memory, nothing to wait for, and one kind of gradient.
    """
    plain = Training(folder, "tied", "fsdp", world, DOUBLE, *more)
    torch.Tensor.pin_memory = lambda self, *_, **__: self
    torch.cpu.Stream.synchronize = lambda self: None
    chosen, fsdp1.CPUOffload = fsdp1.CPUOffload, lambda _: CPUOffload(True)
    moved = Training(folder, "tied", "fsdp", world, DOUBLE, "model.fsdp_config.cpu_offload=true", *more)
    fsdp1.CPUOffload = chosen
    assert moved.model.cpu_offload.offload_params
    FlatParamHandle.prepare_gradient_for_backward = prepare
    figures = [plain.steps(0, 2)]
    FlatParamHandle.prepare_gradient_for_backward = overwrite
    figures.append(moved.steps(0, 2))
    losses = [evaluate(run.model, run.loader, world)[0] for run in (plain, moved)]
    return {
        "figures": max(abs(a - b) / a for a, b in zip(*figures, strict=True)),
        "gradients": worst_difference(moved.gradients(), plain.gradients()),
        "validation": abs(losses[0] - losses[1]) / losses[0],
        "micro_batches": len(plain.loader.batch(0).micro_batches),
    }


def main(out: Path, folder: Path, models: list[str]) -> None:
    world = launch.start("cpu", needs_group=False)
    found: dict[str, Any] = {}
    for model in models:
        found[model] = {
            "fp32": trajectory(folder, model, world),
            "bf16": trajectory(folder, model, world, "model.fsdp_config.dtype=bf16"),
            "resume": there_and_back(folder, model, world),
        }
        gc.collect()
    found["offload"] = offload(folder, world)
    found["offload, no_sync"] = offload(folder, world, "model.fsdp_config.use_no_sync_for_gradient_accumulation=true")
    if world.is_main:
        out.write_text(json.dumps(found))
    gc.collect()
    launch.stop()
    os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])

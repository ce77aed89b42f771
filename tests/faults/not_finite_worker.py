"""One process of `test_not_finite`: a healthy step, a loss that is infinite, a gradient that one rank spoils."""

import gc
import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from apollo_sft.config.compose import compose
from apollo_sft.data.batch.loader import Loader, StepBatch
from apollo_sft.data.store.store_files import SampleStore
from apollo_sft.errors import TrainingError
from apollo_sft.model import load
from apollo_sft.model.sft_model import SftModel
from apollo_sft.parallel import launch
from apollo_sft.parallel.launch import World
from apollo_sft.parallel.mesh import build_mesh
from apollo_sft.train.assemble import assemble
from apollo_sft.train.loaders import plan_spec
from apollo_sft.train.step import train_step


def bits(model: SftModel, optimizer: Optimizer) -> dict[str, Tensor]:
    """This rank's part of all weights and moments."""
    values = dict(model.named_parameters())
    for number, state in enumerate(optimizer.state.values()):
        values |= {f"{number} {name}": value for name, value in state.items()}
    return {name: getattr(value, "_local_tensor", value).detach().clone() for name, value in values.items()}


def refused(model: SftModel, optimizer: Optimizer, batch: StepBatch, world: World) -> dict[str, Any]:
    before = bits(model, optimizer)
    message = "the step was applied"
    try:
        train_step(model, optimizer, batch, world, 1.0)
    except TrainingError as error:
        message = str(error)
    after = bits(model, optimizer)
    return {"message": message, "changed": [name for name in before if not torch.equal(before[name], after[name])]}


def cases(folder: Path, world: World) -> dict[str, Any]:
    base = folder / "model"
    keys = [
        "data.train_batch_size=4",
        "data.micro_batch_size_per_gpu=1",
        "data.train_files=none",
        "data.val_files=null",
    ]
    config = compose([*keys, f"model.partial_pretrain={base}", "optim.lr=1e-2"]).config
    mesh = build_mesh(world, 1)
    hf_config = load.read_config(base, False)
    model, optimizer = assemble(config, base, hf_config, world, mesh)
    loader = Loader(
        SampleStore(folder / "store"),
        replace(plan_spec(config.data, config.trainer.seed, mesh, hf_config), shuffle=False),
        mesh.dp_rank,
    )
    found: dict[str, Any] = {"healthy": train_step(model, optimizer, loader.batch(0), world, 1.0).loss}
    found["loss"] = refused(model, optimizer, loader.batch(1), world)
    if world.rank == world.size - 1:
        model.causal_lm.model.norm.register_forward_hook(
            lambda _module, _inputs, output: output.register_hook(lambda gradient: gradient * float("inf")) and None
        )
    found["gradient"] = refused(model, optimizer, loader.batch(0), world)
    return found


def main(out: Path, folder: Path) -> None:
    world = launch.start("cpu", needs_group=False)
    everyone: list[Any] = [cases(folder, world)]
    if world.size > 1:
        mine, everyone = everyone[0], [None] * world.size
        dist.all_gather_object(everyone, mine)
    if world.is_main:
        out.write_text(json.dumps(everyone))
    gc.collect()
    launch.stop()
    os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))

"""One process of `test_disagreeing_bases`: the loss of one step, and the folder that it leaves. Rank 0 writes."""

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

from apollo_sft.checkpoint.model_folder.write import save_model
from apollo_sft.config.compose import compose
from apollo_sft.data.batch.loader import Loader
from apollo_sft.data.store.store_files import SampleStore
from apollo_sft.errors import ModelError
from apollo_sft.model.load import load_with_weights
from apollo_sft.model.sft_model import SftModel
from apollo_sft.parallel import launch
from apollo_sft.parallel.launch import World
from apollo_sft.parallel.mesh import build_mesh
from apollo_sft.tools.verify.oracle import StaysDouble
from apollo_sft.train.assemble import assemble
from apollo_sft.train.base_model import open_base
from apollo_sft.train.loaders import plan_spec
from apollo_sft.train.step import train_step
from apollo_sft.train.strategy import strategy_of
from apollo_sft.train.weights import check_filled
from tests.support.exports import options

BATCH = 4


def cell(folder: Path, kind: str, world: World, values: list[str], out: Path) -> dict[str, Any]:
    """Train one step. The written folder is that of full fine-tuning."""
    keys = [f"model.partial_pretrain={folder / kind}", "data.train_files=none", "data.val_files=null", *values]
    keys += [f"data.train_batch_size={BATCH}", "data.micro_batch_size_per_gpu=2", "model.fsdp_config.model_dtype=fp64"]
    config = compose(keys).config
    mesh = build_mesh(world, config.ulysses_sequence_parallel_size)
    base, hf_config = open_base(config)
    model, optimizer = assemble(config, base.folder, hf_config, world, mesh)
    spec = replace(plan_spec(config.data, config.trainer.seed, mesh, hf_config), shuffle=False)
    batch = Loader(SampleStore(folder / "store"), spec, mesh.dp_rank, mesh.sp_size).batch(0)
    with StaysDouble():
        result = train_step(model, optimizer, batch, world, None)
    rows = strategy_of(model).by_rows(model)
    if "model.lora_rank=2" not in values:
        out.mkdir(exist_ok=True)
        save_model(rows.causal_lm, base, out, options(), world.is_main)
    return {"loss": result.loss, "untied": list(base.untied)}


def damaged(folder: Path, world: World, strategy: str) -> list[str]:
    """What every rank says when one value of the last rank's shard of a parameter is not the one that was read."""
    keys = [f"model.partial_pretrain={folder / 'ties-two'}", "data.train_files=none", "data.val_files=null"]
    config = compose([*keys, f"model.strategy={strategy}"]).config
    mesh = build_mesh(world, 1)
    base, hf_config = open_base(config)
    model, _ = assemble(config, base.folder, hf_config, world, mesh)
    source = SftModel(load_with_weights(base.folder, hf_config, torch.float32, False)) if world.is_main else None
    held, buffers = strategy_of(model).held(model), dict(strategy_of(model).outline(model).named_buffers())
    check_filled(held, buffers, source, mesh)
    name = max(held, key=lambda name: held[name][1].numel())
    if world.rank == world.size - 1:
        with torch.no_grad():
            held[name][1].view(-1)[-1] += 1
    said = [""] * world.size
    try:
        check_filled(held, buffers, source, mesh)
        message = "nothing"
    except ModelError as error:
        message = str(error)
    dist.all_gather_object(said, f"{name}: {message}")
    return said


def of_other_dtypes(folder: Path, world: World) -> dict[str, Any]:
    """A model held in bfloat16 whose files have a buffer in float32: what this rank holds of it."""
    keys = [f"model.partial_pretrain={folder / 'float32-buffer'}", "data.train_files=none", "data.val_files=null"]
    config = compose([*keys, "model.fsdp_config.model_dtype=bf16"]).config
    base, hf_config = open_base(config)
    model, _ = assemble(config, base.folder, hf_config, world, build_mesh(world, 1))
    [(name, buffer)] = [pair for pair in model.named_buffers() if "correction_bias" in pair[0]]
    held: list[Any] = [None] * world.size
    mine = [name.removeprefix("causal_lm."), str(buffer.dtype), buffer.double().tolist()]
    dist.all_gather_object(held, mine)
    return {"held": held}


def main(out: Path, folder: Path) -> None:
    world = launch.start("cpu", needs_group=False)
    job = json.loads((folder / "job.json").read_text())
    figures = {}
    for kind in job["kinds"]:
        for values in job["layouts"]:
            name = f"{kind} {' '.join(values)}"
            figures[name] = cell(folder, kind, world, values, folder / f"{world.size} {name.replace('/', '_')}")
            gc.collect()
    if world.size > 1:
        figures["damaged buffer"] = of_other_dtypes(folder, world)
        figures |= {f"damaged {strategy}": damaged(folder, world, strategy) for strategy in ("fsdp2", "fsdp")}
    if world.is_main:
        out.write_text(json.dumps(figures))
    gc.collect()
    launch.stop()
    os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))

"""One process of `test_added_tokens`: a step of a grown model under every layout, against the oracle. Rank 0 writes."""

import gc
import json
import os
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from transformers import AutoModelForCausalLM

from apollo_sft.config.compose import compose
from apollo_sft.data.batch.loader import Loader
from apollo_sft.data.store.store_files import SampleStore
from apollo_sft.model import load
from apollo_sft.parallel import launch
from apollo_sft.parallel.launch import World
from apollo_sft.parallel.mesh import build_mesh
from apollo_sft.tools.verify.oracle import StaysDouble
from apollo_sft.train.assemble import assemble
from apollo_sft.train.loaders import plan_spec
from apollo_sft.train.step import train_step
from apollo_sft.train.strategy import strategy_of
from apollo_sft.types import Growth
from tests.support.oracle import Gradients, oracle_gradients, whole, worst_difference

BATCH = 8


def expected(base: Path, growth: Growth, store: SampleStore) -> tuple[float, Gradients]:
    """Plain transformers; the new rows are put there by hand."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64, attn_implementation="eager")
    old = {name: table.detach().clone() for name, table in model.state_dict().items()}
    model.resize_token_embeddings(growth.rows, mean_resizing=False)
    with torch.no_grad():
        for name, table in model.state_dict().items():
            if table.shape != old[name].shape or len(table) == growth.rows:
                table[: len(old[name])] = old[name]
                table[list(growth.ids)] = old[name][: growth.known].mean(0)
    with StaysDouble():
        return oracle_gradients(model, [store[i] for i in range(BATCH)])


def cell(base: Path, growth: Growth, world: World, values: list[str], wanted: tuple[float, Gradients]) -> list[float]:
    """Relative differences of the loss and of the worst gradient."""
    keys = [f"model.partial_pretrain={base}", "data.train_files=none", "data.val_files=null", *values]
    keys += [f"data.train_batch_size={BATCH}", "data.micro_batch_size_per_gpu=2", "model.fsdp_config.model_dtype=fp64"]
    config = compose(keys).config
    mesh = build_mesh(world, config.ulysses_sequence_parallel_size)
    hf_config = load.with_rows(load.read_config(base, False), growth.rows)
    model, optimizer = assemble(config, base, hf_config, world, mesh, growth)
    spec = replace(plan_spec(config.data, config.trainer.seed, mesh, hf_config), shuffle=False)
    store = SampleStore(base.parent / "store")
    batch = Loader(store, spec, mesh.dp_rank, mesh.sp_size).batch(0)
    with StaysDouble():
        result = train_step(model, optimizer, batch, world, None)
    rows = strategy_of(model).by_rows(model, gradients=True)
    found = {name: whole(p.grad) for name, p in rows.causal_lm.named_parameters()}
    return [abs(result.loss - wanted[0]) / wanted[0], worst_difference(found, wanted[1])]


def main(out: Path, folder: Path) -> None:
    world = launch.start("cpu", needs_group=False)
    job = json.loads((folder / "job.json").read_text())
    figures = {}
    for name, raw in job["models"].items():
        growth = Growth(**raw)
        wanted = expected(folder / name, growth, SampleStore(folder / "store"))
        for values in job["layouts"] if world.size > 1 else [[]]:
            figures[f"{name} {' '.join(values)}"] = cell(folder / name, growth, world, values, wanted)
            gc.collect()
    if world.is_main:
        out.write_text(json.dumps(figures))
    gc.collect()
    launch.stop()
    os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))

"""One process of `test_sources`: steps and validations over several sources, each layout, in fp64. Rank 0 writes."""

import gc
import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from apollo_sft.config.compose import compose
from apollo_sft.config.schema import SftConfig
from apollo_sft.data.batch.loader import Loader
from apollo_sft.data.batch.mixture import Mixture
from apollo_sft.data.batch.plan import plan
from apollo_sft.data.store.store_files import SampleStore
from apollo_sft.model import attention, load
from apollo_sft.parallel import launch
from apollo_sft.parallel.launch import World
from apollo_sft.parallel.mesh import build_mesh
from apollo_sft.report.metrics import losses_by_name, source_record
from apollo_sft.train.assemble import assemble
from apollo_sft.train.loaders import plan_spec
from apollo_sft.train.step import train_step
from apollo_sft.train.validation import evaluate
from tests.support.oracle import oracle_loss

STEPS = 3
SOURCES = Mixture(("long", "short", "rare"), (20, 9, 1), (8, 17, 1))
SETS = Mixture(SOURCES.names, SOURCES.sizes, SOURCES.sizes)
LAYOUTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "micro-batches of one": {"data.micro_batch_size_per_gpu": 1},
    "balanced, capped, checkpointed": {
        "data.balance_dp_token": True,
        "data.use_dynamic_bsz": True,
        "data.max_token_len_per_gpu": 64,
        "model.enable_gradient_checkpointing": True,
    },
}
SHARDED: dict[str, dict[str, Any]] = {
    "sequences shared": {"ulysses_sequence_parallel_size": 2},
    "fsdp": {"model.strategy": "fsdp"},
    "offload": {"model.fsdp_config.cpu_offload": True},
}


def config_of(base: Path, values: dict[str, Any]) -> SftConfig:
    keys = [f"model.partial_pretrain={base}", "data.train_files=none", "data.val_files=null", "optim.lr=1e-2"]
    keys += ["data.train_batch_size=9", "data.micro_batch_size_per_gpu=3", "model.fsdp_config.model_dtype=fp64"]
    return compose([*keys, *(f"++{key}={value}" for key, value in values.items())]).config


def expected(base: Path, store: SampleStore, config: SftConfig) -> list[dict[str, Any]]:
    """Of each source, by plain transformers at the first weights: its token mean in each step, and of all its rows."""
    hf_config = load.read_config(base, False)
    attention.register(attention.sdpa_kernel)
    model = load.load_with_weights(base, hf_config, torch.float64, False).eval()
    spec = replace(
        plan_spec(
            config.data, config.trainer.seed, build_mesh(World(0, 1, 0, torch.device("cpu")), 1), hf_config, SOURCES
        ),
        dp_size=1,
    )
    steps = [plan(store.lengths, spec, step).samples for step in range(STEPS)]
    found = []
    for ids in [*steps, torch.arange(len(store)).numpy()]:
        record = {}
        for number, name in enumerate(SOURCES.names):
            mine = [store[int(i)] for i in ids[SOURCES.source_of(ids) == number]]
            with torch.no_grad():
                loss, targets = oracle_loss(model, mine)
            record[name] = [float(loss), targets]
        found.append(record)
    return found


def measured(base: Path, store: SampleStore, values: dict[str, Any], world: World) -> dict[str, Any]:
    """As `expected`, in one layout, the weights held still; and what a step without sources gives."""
    config = config_of(base, values)
    mesh = build_mesh(world, config.ulysses_sequence_parallel_size)
    hf_config = load.read_config(base, False)
    model, optimizer = assemble(config, base, hf_config, world, mesh)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    spec = plan_spec(config.data, config.trainer.seed, mesh, hf_config, SOURCES)
    loader = Loader(store, spec, mesh.dp_rank, mesh.sp_size)
    found = []
    for step in range(STEPS):
        batch = loader.batch(step)
        result = train_step(model, optimizer, batch, world, None)
        pairs = zip(result.source_sums, batch.sources.values(), strict=True)
        whole = [result.loss * batch.num_targets, batch.num_targets]
        found.append({"whole": whole, **dict(zip(batch.sources, map(list, pairs), strict=True))})
        logged = losses_by_name(source_record("train", result.source_sums, batch.sources), "train")
        assert logged.keys() == {name for name, number in batch.sources.items() if number}
    val = replace(spec, batch_size=3 * mesh.dp_size, shuffle=False, mixture=SETS)
    evaluated = evaluate(model, Loader(store, val, mesh.dp_rank, mesh.sp_size), world)
    assert evaluated is not None
    loss, targets, of_sets = evaluated
    means = losses_by_name(of_sets, "val")
    counts = {name: int(of_sets[f"val/{name}/targets"]) for name in SETS.names}
    found.append({"whole": [loss * targets, targets], **{n: [means[n] * counts[n], counts[n]] for n in means}})
    plain = evaluate(model, Loader(store, replace(val, mixture=None), mesh.dp_rank, mesh.sp_size), world)
    assert plain is not None
    return {"records": found, "val/loss": [loss, plain[0]], "of a plain one": plain[2]}


def figures(folder: Path, world: World) -> dict[str, Any]:
    store = SampleStore(folder / "store")
    layouts = LAYOUTS | (SHARDED if world.size > 1 else {})
    found = {name: measured(folder / "model", store, values, world) for name, values in layouts.items()}
    records = expected(folder / "model", store, config_of(folder / "model", {})) if world.is_main else []
    return {"layouts": found, "expected": records}


def main(out: Path, folder: Path) -> None:
    world = launch.start("cpu", needs_group=False)
    found = figures(folder, world)
    if world.is_main:
        out.write_text(json.dumps(found))
    gc.collect()
    launch.stop()
    os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))

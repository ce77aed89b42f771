"""Loss and targets of each source and of each validation set, on 1, 2 and 4 ranks, against one process written out."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from apollo_sft.config.compose import compose
from apollo_sft.config.schema import SftConfig
from apollo_sft.data.batch.loader import Loader
from apollo_sft.data.batch.mixture import Mixture
from apollo_sft.data.batch.plan import plan
from apollo_sft.data.store.store_files import SampleStore
from apollo_sft.model import attention, load
from apollo_sft.parallel.launch import World
from apollo_sft.parallel.mesh import build_mesh
from apollo_sft.report.metrics import losses_by_name, source_record
from apollo_sft.train.assemble import assemble
from apollo_sft.train.loaders import plan_spec
from apollo_sft.train.step import train_step
from apollo_sft.train.validation import evaluate
from tests.support.models import save_tiny_model, tiny_config
from tests.support.oracle import oracle_loss
from tests.support.ranks import run_on_ranks
from tests.support.samples import random_samples, write_store

NAMES = {"long", "short", "rare"}


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


def figures(world: World, folder: Path) -> dict[str, Any]:
    store = SampleStore(folder / "store")
    layouts = LAYOUTS | (SHARDED if world.size > 1 else {})
    found = {name: measured(folder / "model", store, values, world) for name, values in layouts.items()}
    records = expected(folder / "model", store, config_of(folder / "model", {})) if world.is_main else []
    return {"layouts": found, "expected": records}


@pytest.fixture(scope="module", params=[1, 2, pytest.param(4, marks=pytest.mark.long)])
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Thirty samples in three sources, of the last one a single one, in the three steps of an epoch of 26."""
    folder = tmp_path_factory.mktemp("sources")
    save_tiny_model(folder / "model", tiny_config("Qwen2"))
    write_store(folder / "store", random_samples(32)[2:])
    if request.param == 1:
        return figures(World(0, 1, 0, torch.device("cpu")), folder)
    result: dict[str, Any] = run_on_ranks(figures, request.param, folder)[0]
    return result


def test_every_source_has_the_loss_of_its_own_targets(found: dict[str, Any]) -> None:
    worst = 0.0
    for name, layout in found["layouts"].items():
        assert len(layout["records"]) == len(found["expected"]) == 4
        for record, expected in zip(layout["records"], found["expected"], strict=True):
            assert record.keys() - {"whole"} == expected.keys() == NAMES
            for source, (loss, targets) in expected.items():
                assert record[source][1] == targets, (name, source)
                worst = max(worst, abs(record[source][0] - loss) / max(loss, 1))
            together = [sum(part) for part in zip(*expected.values(), strict=True)]
            assert record["whole"][1] == together[1]
            worst = max(worst, abs(record["whole"][0] - together[0]) / together[0])
    print(f"\nlosses of sources: worst {worst:.1e}")
    assert worst <= 1e-12
    assert len(found["layouts"]) >= 3


def test_sets_change_nothing_of_the_whole_validation(found: dict[str, Any]) -> None:
    for layout in found["layouts"].values():
        named, plain = layout["val/loss"]
        assert named == plain
        assert layout["of a plain one"] == {}

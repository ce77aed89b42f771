"""Bases whose config.json and files disagree on the head: the files decide, on every rank, and the folder says so."""

import gc
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from apollo_sft.checkpoint.model_folder.write import save_model
from apollo_sft.config.compose import compose
from apollo_sft.data.batch.loader import Loader
from apollo_sft.data.store.store_files import SampleStore
from apollo_sft.errors import ModelError
from apollo_sft.model.load import load_with_weights
from apollo_sft.model.sft_model import SftModel
from apollo_sft.parallel.launch import World
from apollo_sft.parallel.mesh import build_mesh
from apollo_sft.tools.verify.oracle import StaysDouble
from apollo_sft.train.assemble import assemble
from apollo_sft.train.base_model import open_base
from apollo_sft.train.check_model import check_model
from apollo_sft.train.loaders import plan_spec
from apollo_sft.train.step import train_step
from apollo_sft.train.strategy import strategy_of
from apollo_sft.train.weights import check_filled
from tests.support.disagreeing import HEAD, as_the_files_say, write_disagreeing, write_with_a_float32_buffer
from tests.support.exports import options
from tests.support.oracle import oracle_loss
from tests.support.ranks import run_on_ranks
from tests.support.samples import random_samples, write_store

UNTIED = ("ties-two", "ties-vision-two")
KINDS = (*UNTIED, "ties-equal", "ties-head", "unties-two", "unties-equal")
LAYOUTS = [
    ["model.strategy=fsdp2"],
    ["model.strategy=fsdp"],
    ["model.strategy=fsdp2", "model.lora_rank=2"],
    ["model.strategy=fsdp", "model.lora_rank=2"],
]
ONE_PROCESS = [LAYOUTS[0], LAYOUTS[2]]
"""The strategy changes nothing there."""


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
    rows = strategy_of(model).as_row_sharded(model)
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


def cells_of(world: World, folder: Path, layouts: list[list[str]]) -> dict[str, Any]:
    """On every rank: the loss of one step, and the folder that it leaves; and what is said of damaged shards."""
    figures: dict[str, Any] = {}
    for kind in KINDS:
        for values in layouts:
            name = f"{kind} {' '.join(values)}"
            figures[name] = cell(folder, kind, world, values, folder / f"{world.size} {name.replace('/', '_')}")
            gc.collect()
    if world.size > 1:
        figures["damaged buffer"] = of_other_dtypes(folder, world)
        figures |= {f"damaged {strategy}": damaged(folder, world, strategy) for strategy in ("fsdp2", "fsdp")}
    return figures


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("disagreeing")
    for kind in KINDS:
        write_disagreeing(folder / kind, kind)
    write_with_a_float32_buffer(folder / "float32-buffer")
    write_store(folder / "store", random_samples(4, vocab_size=90))
    return folder


@pytest.fixture(scope="module")
def expected(folder: Path) -> dict[str, float]:
    """The loss before the first step, of a model that was built from the files by hand."""
    losses = {}
    for kind in KINDS:
        with torch.no_grad(), StaysDouble():  # type: ignore[no-untyped-call]
            total, targets = oracle_loss(as_the_files_say(folder / kind), random_samples(4, vocab_size=90))
        losses[kind] = float(total) / targets
    return losses


@pytest.fixture(scope="module", params=[1, 2, pytest.param(4, marks=pytest.mark.long)])
def found(request: pytest.FixtureRequest, folder: Path) -> tuple[int, dict[str, Any]]:
    layouts = LAYOUTS if request.param > 1 else ONE_PROCESS
    return request.param, run_on_ranks(cells_of, request.param, folder, layouts)[0]


def test_every_layout_trains_what_the_files_hold(found: tuple[int, dict[str, Any]], expected: dict[str, float]) -> None:
    figures = {name: cell for name, cell in found[1].items() if not name.startswith("damaged")}
    assert len(figures) == len(KINDS) * len(LAYOUTS if found[0] > 1 else ONE_PROCESS)
    off = {name: abs(cell["loss"] - expected[name.split()[0]]) for name, cell in figures.items()}
    assert {name: value for name, value in off.items() if not value < 1e-10} == {}
    assert expected["ties-two"] != pytest.approx(expected["ties-equal"], rel=1e-3), "the head must matter"


def test_a_shard_that_is_not_what_was_read_stops_every_rank(found: tuple[int, dict[str, Any]]) -> None:
    size, figures = found
    said = {name: cell for name, cell in figures.items() if name.startswith("damaged fsdp")}
    assert len(said) == (2 if size > 1 else 0)
    for messages in said.values():
        assert len(messages) == size
        name = messages[-1].partition(":")[0]  # the last rank's value was changed
        for message in messages:
            assert "do not hold the weights that rank 0 has read" in message
            assert f"tensors differ: {name}" in message


def test_a_buffer_keeps_the_dtype_and_the_values_of_the_files(found: tuple[int, dict[str, Any]], folder: Path) -> None:
    """DeepSeek's routers choose experts by such a buffer: rounded on some ranks, they would choose others."""
    size, figures = found
    if size == 1:
        pytest.skip("one process holds what it has read")
    held = figures["damaged buffer"]["held"]
    assert len(held) == size
    for name, dtype, values in held:
        stored = load_file(folder / "float32-buffer" / "model.safetensors")[name]
        assert dtype == "torch.float32"
        assert values == stored.double().tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_config_and_files_of_the_written_folder_agree(
    found: tuple[int, dict[str, Any]], folder: Path, kind: str
) -> None:
    size, figures = found
    for values in LAYOUTS[:2] if size > 1 else ONE_PROCESS[:1]:
        name = f"{kind} {' '.join(values)}"
        assert bool(figures[name]["untied"]) == (kind in UNTIED)
        out = folder / f"{size} {name}"
        weights, before = (load_file(path / "model.safetensors") for path in (out, folder / kind))
        raw = json.loads((out / "config.json").read_text())
        is_tied = kind in ("ties-equal", "ties-head")
        assert raw["tie_word_embeddings"] is raw.get("text_config", raw)["tie_word_embeddings"] is is_tied
        once = {HEAD} if kind == "ties-equal" else set()
        assert weights.keys() == before.keys() - once
        model, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"]
        tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
        assert tied == is_tied


def test_a_head_that_the_files_lack_is_refused_by_name(tmp_path: Path) -> None:
    write_disagreeing(tmp_path / "base", "unties-one")
    keys = [f"model.partial_pretrain={tmp_path / 'base'}", "data.train_files=none", "data.val_files=null"]
    with pytest.raises(ModelError) as caught:
        check_model(compose([*keys, f"trainer.default_local_dir={tmp_path / 'out'}"]).config)
    message = str(caught.value)
    assert "config.json says that the head is a weight of its own" in message
    assert "no lm_head.weight in the files" in message
    assert "tie_word_embeddings=true in config.json" in message

"""A loss that is not a number ends the run on every rank; it names step and rows, and nothing is poisoned."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.optim import Optimizer

from apollo_sft.__main__ import main
from apollo_sft.checkpoint.publish import model_files
from apollo_sft.config.compose import compose
from apollo_sft.data.batch.loader import Loader, StepBatch
from apollo_sft.data.store.store_files import SampleStore
from apollo_sft.errors import TrainingError
from apollo_sft.model import load
from apollo_sft.model.sft_model import SftModel
from apollo_sft.parallel.launch import World
from apollo_sft.parallel.mesh import build_mesh
from apollo_sft.train.assemble import assemble
from apollo_sft.train.loaders import plan_spec
from apollo_sft.train.step import train_step
from tests.support.data import tiny_tokenizer, write_parquet
from tests.support.models import save_tiny_model, tiny_config
from tests.support.ranks import run_on_ranks
from tests.support.runs import arguments, finish, read_metrics, rows, start, status, write_inputs
from tests.support.samples import random_samples, write_store

BAD_ROW = 29


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One row asks with a letter that no other row has; the base's embedding of it is infinite."""
    folder = write_inputs(tmp_path_factory.mktemp("inputs"))
    table = rows(40)
    table[BAD_ROW]["question"] = "Z"
    write_parquet(folder / "train.parquet", table)
    (token,) = tiny_tokenizer()("Z")["input_ids"]
    weights = load_file(folder / "model" / "model.safetensors")
    weights["model.embed_tokens.weight"][token, 3] = float("inf")
    save_file(weights, folder / "model" / "model.safetensors", metadata={"format": "pt"})
    return folder


def check(inputs: Path, out: Path, said: str) -> None:
    last = len(read_metrics(out))
    assert f"apollo-sft: step {last + 1}: the loss or its gradient is not finite" in said
    assert f"{inputs}/train.parquet row {BAD_ROW}" in said
    assert said.count("is not finite") == 1
    assert status(out) == "failed"
    assert not model_files(out)
    assert not (out / "config.json").exists()
    assert not list(out.glob("*.safetensors"))
    assert all(record["train/loss"] < 100 for record in read_metrics(out))


def test_one_process(inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = main(arguments(inputs, tmp_path / "out", "data.micro_batch_size_per_gpu=1"))
    said = capsys.readouterr().err
    assert code == 1
    check(inputs, tmp_path / "out", said)
    assert said.partition("is not finite")[2].count("parquet row") == 1, "a micro-batch of one row names it alone"


def test_two_processes(inputs: Path, tmp_path: Path) -> None:
    process = start(inputs, tmp_path / "out", processes=2)
    said = finish(process)
    assert process.returncode == 1, said[-4000:]
    check(inputs, tmp_path / "out", said)


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


def cases(world: World, folder: Path) -> dict[str, Any]:
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


@pytest.mark.parametrize("processes", [1, 2])
def test_no_weight_changes_on_any_rank(tmp_path: Path, processes: int) -> None:
    folder = save_tiny_model(tmp_path / "model", tiny_config("Llama"))
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"][96, 3] = float("inf")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    samples = random_samples(8, vocab_size=96)
    samples[6].input_ids[0] = 96
    write_store(tmp_path / "store", samples)
    ranks = run_on_ranks(cases, processes, tmp_path)
    assert len(ranks) == processes
    for rank in ranks:
        assert rank["healthy"] > 0
        for case in ("loss", "gradient"):
            assert rank[case]["changed"] == []
            assert rank[case] == ranks[0][case], "all ranks say the same"
    assert "step 2: " in ranks[0]["loss"]["message"]
    assert "rows: rows row 6\n" in ranks[0]["loss"]["message"]
    assert "step 1: " in ranks[0]["gradient"]["message"]
    named = ranks[0]["gradient"]["message"]
    assert [row for row in range(8) if f"rows row {row}" in named] == [0, 1, 2, 3], "any of the step's rows may be it"

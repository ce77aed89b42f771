"""model.add_special_tokens: gradients of grown models under every layout, and gpt2 with `chatml` from end to end."""

from __future__ import annotations

import gc
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from apollo_sft.checkpoint.model_folder.tensor_files import read_base_tensors
from apollo_sft.cli.main import main
from apollo_sft.config.compose import compose
from apollo_sft.data.batch.loader import Loader
from apollo_sft.data.store.store_files import SampleStore
from apollo_sft.model import load
from apollo_sft.parallel.launch import World
from apollo_sft.parallel.mesh import build_mesh
from apollo_sft.tools.verify.oracle import StaysDouble
from apollo_sft.train.assemble import assemble
from apollo_sft.train.loaders import plan_spec
from apollo_sft.train.step import train_step
from apollo_sft.train.strategy import strategy_of
from apollo_sft.types import AddedTokens
from tests.support.data import write_parquet
from tests.support.models import save_tiny_model, tiny_config
from tests.support.oracle import Gradients, oracle_gradients, whole, worst_difference
from tests.support.ranks import run_on_ranks
from tests.support.runs import finish, start, train_here
from tests.support.samples import random_samples, write_store

SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "tokenizers" / "gpt2"
BOUND = 1e-9
LAYOUTS = [
    ["model.strategy=fsdp2"],
    ["model.strategy=fsdp2", "model.fsdp_config.offload_params=true"],
    ["model.strategy=fsdp2", "ulysses_sequence_parallel_size=2"],
    ["model.strategy=fsdp"],
]
NEW = AddedTokens(("<a>", "<b>"), (97, 98), known=97, held=97, rows=99)
MODELS: dict[str, tuple[Any, AddedTokens]] = {
    "tied": (tiny_config("GPT2", resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0), NEW),
    "untied": (tiny_config("Qwen2", tie_word_embeddings=False), NEW),
    "padded": (
        tiny_config("Qwen2", vocab_size=103),
        AddedTokens(("<a>", "<b>"), (97, 98), known=97, held=103, rows=103),
    ),
}


BATCH = 8


def expected(base: Path, new_tokens: AddedTokens, store: SampleStore) -> tuple[float, Gradients]:
    """Plain transformers; the new rows are put there by hand."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64, attn_implementation="eager")
    old = {name: table.detach().clone() for name, table in model.state_dict().items()}
    model.resize_token_embeddings(new_tokens.rows, mean_resizing=False)
    with torch.no_grad():
        for name, table in model.state_dict().items():
            if table.shape != old[name].shape or len(table) == new_tokens.rows:
                table[: len(old[name])] = old[name]
                table[list(new_tokens.ids)] = old[name][: new_tokens.known].mean(0)
    with StaysDouble():
        return oracle_gradients(model, [store[i] for i in range(BATCH)])


def cell(
    base: Path, new_tokens: AddedTokens, world: World, values: list[str], wanted: tuple[float, Gradients]
) -> list[float]:
    """Relative differences of the loss and of the worst gradient."""
    keys = [f"model.partial_pretrain={base}", "data.train_files=none", "data.val_files=null", *values]
    keys += [f"data.train_batch_size={BATCH}", "data.micro_batch_size_per_gpu=2", "model.fsdp_config.model_dtype=fp64"]
    config = compose(keys).config
    mesh = build_mesh(world, config.ulysses_sequence_parallel_size)
    hf_config = load.with_rows(load.read_config(base, False), new_tokens.rows)
    model, optimizer = assemble(config, base, hf_config, world, mesh, new_tokens)
    spec = replace(plan_spec(config.data, config.trainer.seed, mesh, hf_config), shuffle=False)
    store = SampleStore(base.parent / "store")
    batch = Loader(store, spec, mesh.dp_rank, mesh.sp_size).batch(0)
    with StaysDouble():
        result = train_step(model, optimizer, batch, world, None)
    rows = strategy_of(model).as_row_sharded(model, gradients=True)
    found = {name: whole(p.grad) for name, p in rows.causal_lm.named_parameters()}
    return [abs(result.loss - wanted[0]) / wanted[0], worst_difference(found, wanted[1])]


def grow(
    world: World, folder: Path, models: dict[str, AddedTokens], layouts: list[list[str]]
) -> dict[str, list[float]]:
    """On every rank: a step of every grown model under every layout, against the oracle."""
    figures = {}
    for name, new_tokens in models.items():
        wanted = expected(folder / name, new_tokens, SampleStore(folder / "store"))
        for values in layouts:
            figures[f"{name} {' '.join(values)}"] = cell(folder / name, new_tokens, world, values, wanted)
            gc.collect()
    return figures


@pytest.mark.parametrize("size", [1, 2, pytest.param(4, marks=pytest.mark.long)])
def test_gradients_of_a_grown_model(tmp_path: Path, size: int) -> None:
    for name, (config, _) in MODELS.items():
        save_tiny_model(tmp_path / name, config, torch.float64)
    samples = random_samples(8, vocab_size=99)
    assert {97, 98} <= {int(token) for sample in samples for token in sample.labels}
    write_store(tmp_path / "store", samples)
    models = {name: new_tokens for name, (_, new_tokens) in MODELS.items()}
    figures = run_on_ranks(grow, size, tmp_path, models, LAYOUTS if size > 1 else [[]])[0]
    assert len(figures) == len(MODELS) * (1 if size == 1 else len(LAYOUTS))
    beyond = {name: values for name, values in figures.items() if not max(values) < BOUND}
    assert not beyond


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small GPT-2 with the tokenizer of gpt2, which has no template, and rows with one answer."""
    if not SHARED.is_dir():
        pytest.skip("../shared/tokenizers is not here")
    folder = tmp_path_factory.mktemp("gpt2")
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 128, "resid_pdrop": 0.0}
    config = AutoConfig.for_model("gpt2", attn_pdrop=0.0, embd_pdrop=0.0, **sizes)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(folder / "model")
    AutoTokenizer.from_pretrained(SHARED).save_pretrained(folder / "model")
    rows = [{"question": f"What is {i} minus {i}?", "answer": "Zero."} for i in range(40)]
    write_parquet(folder / "train.parquet", rows)
    write_parquet(folder / "val.parquet", rows[:4])
    return folder


ADD = (
    "data.chat_template=chatml",
    "data.max_length=64",
    "model.add_special_tokens=true",
    "model.fsdp_config.model_dtype=fp64",
    "optim.lr=5e-2",
    "trainer.total_training_steps=32",
    "trainer.save_freq=24",
    "trainer.test_freq=32",
)


@pytest.fixture(scope="module")
def run(inputs: Path) -> Path:
    out = inputs / "run"
    process = start(inputs, out, *ADD, processes=2)
    said = finish(process)
    assert process.returncode == 0, said[-3000:]
    assert (
        "added to the tokenizer: <|im_start|>, <|im_end|>; the embedding table grows from 50,257 to 50,259 rows" in said
    )
    return out


@pytest.mark.shared
def test_gpt2_with_chatml_loads_in_plain_transformers_and_stops(inputs: Path, run: Path) -> None:
    tokenizer, model = AutoTokenizer.from_pretrained(run), AutoModelForCausalLM.from_pretrained(run)
    stop = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert (stop, len(tokenizer), model.config.vocab_size) == (50258, 50259, 50259)
    assert (tokenizer.eos_token_id, model.config.eos_token_id) == (stop, stop)
    assert model.generation_config.eos_token_id == [stop, 50256]
    prompt = [{"role": "user", "content": "What is 7 minus 7?"}]
    given = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    said = model.generate(**given, max_new_tokens=30, do_sample=False, pad_token_id=50256)[
        0, given["input_ids"].shape[1] :
    ]
    assert tokenizer.decode(said) == "Zero.<|im_end|>"
    before, after = (read_base_tensors(folder) for folder in (inputs / "model", run))
    changed = {name: spec.shape for name, spec in after.items() if spec != before[name]}
    assert before.keys() == after.keys()
    assert changed == {"transformer.wte.weight": (50259, 16)}
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    old = load_file(inputs / "model" / "model.safetensors")["transformer.wte.weight"]
    new = load_file(run / "model.safetensors")["transformer.wte.weight"]
    mean = old.double().mean(0).to(new.dtype)
    assert not torch.equal(new[50257], mean) and not torch.equal(new[50258], mean)
    assert not torch.equal(new[50257], new[50258])


@pytest.mark.shared
def test_a_run_goes_on_with_the_grown_model_on_another_number_of_ranks(inputs: Path, run: Path) -> None:
    half = run / "checkpoints" / "step_000024"
    assert load_file(half / "hf" / "model.safetensors")["transformer.wte.weight"].shape == (50259, 16)
    out = inputs / "again"
    train_here(inputs, out, *ADD, "trainer.resume_mode=resume_path", f"trainer.resume_from_path={half}")
    first, second = (load_file(folder / "model.safetensors") for folder in (run, out))
    off = max(float((first[name] - second[name]).float().norm() / first[name].float().norm()) for name in first)
    assert off < 1e-3  # in bfloat16, of numbers that differ by sums in another order


@pytest.mark.shared
def test_commands_know_the_grown_model(inputs: Path, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(run), str(inputs / "exported")]) == 0
    for name in ("model.safetensors", "config.json", "tokenizer.json", "generation_config.json"):
        assert (inputs / "exported" / name).read_bytes() == (run / name).read_bytes()
    assert main(["handoff", str(run)]) == 0, capsys.readouterr().out
    keys = [f"model.partial_pretrain={inputs / 'model'}", f"data.train_files={inputs / 'train.parquet'}", *ADD]
    keys += ["data.val_files=null", f"data.store_dir={inputs / 'store'}", "data.train_batch_size=8"]
    capsys.readouterr()
    assert main(["inspect", *keys]) == 0
    assert "<|im_end|>" in capsys.readouterr().out
    assert main(["plan", *keys, "--gpus", "1", "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    parameters = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(run).parameters())
    assert planned["model"]["parameters"] == parameters

"""What the model says during training is what plain transformers says with the weights of that step."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel

from apollo_sft.checkpoint.run_folder.lookup import find_run
from apollo_sft.config.compose import compose
from apollo_sft.model import load
from apollo_sft.parallel.launch import World
from apollo_sft.parallel.mesh import build_mesh
from apollo_sft.train.assemble import assemble
from apollo_sft.train.generations import MAX_NEW_TOKENS, continuations
from tests.support.models import save_tiny_adapter, save_tiny_model, tiny_config
from tests.support.ranks import run_on_ranks
from tests.support.runs import finish, read_metrics, start, status, train_here, write_inputs

PROMPTS = [[5, 9, 14], [40], list(range(20, 60, 3)), [7, 7, 7, 7, 7]]
LIMIT = 40
KEYS = ("trainer.generate_samples=3", "trainer.test_freq=2", "trainer.save_freq=2", "trainer.total_training_steps=4")


SP = "ulysses_sequence_parallel_size=2"
FSDP1 = "model.strategy=fsdp"
LAYOUTS: dict[str, tuple[str, list[str]]] = {
    "data ranks": ("untied", []),
    "tied": ("tied", []),
    "sequence ranks": ("untied", [SP]),
    "fsdp1": ("untied", [FSDP1]),
    "fsdp1, tied, sequence ranks": ("tied", [FSDP1, SP]),
    "offload": ("untied", ["model.fsdp_config.cpu_offload=true"]),
    "adapter": ("lora", []),
    "adapter, sequence ranks": ("lora", [SP]),
}


def said(folder: Path, name: str, more: list[str], world: World, asked: dict[str, Any]) -> Any:
    base = folder / name
    keys = [f"model.partial_pretrain={base}", "data.train_files=none", "data.val_files=null", *more]
    keys += [f"model.lora_adapter_path={base / 'adapter'}"] if name == "lora" else []
    config = compose(keys).config
    mesh = build_mesh(world, config.ulysses_sequence_parallel_size)
    model, _ = assemble(config, base, load.read_config(base, False), world, mesh)
    stops = frozenset(asked["stops"][name])
    found = continuations(model, asked["prompts"], stops, world, asked["limit"])
    assert model.training
    assert continuations(model, asked["prompts"], stops, world, stopped=lambda: True) is None
    return found


def said_by_all(world: World, folder: Path) -> dict[str, Any]:
    """On every rank: what a model says under every layout."""
    asked = json.loads((folder / "asked.json").read_text())
    return {layout: said(folder, name, more, world, asked) for layout, (name, more) in LAYOUTS.items()}


@torch.no_grad()
def greedy(model: Any, prompt: list[int], most: int, stops: list[int]) -> list[int]:
    """transformers' own generation, with its cache."""
    config = transformers.GenerationConfig(
        max_new_tokens=most, do_sample=False, eos_token_id=stops or None, pad_token_id=0
    )
    inputs = torch.tensor([prompt])
    output = model.generate(inputs, attention_mask=torch.ones_like(inputs), generation_config=config)
    found: list[int] = output[0, len(prompt) :].tolist()
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models, and of each a token that ends its second and perhaps other replies."""
    folder = tmp_path_factory.mktemp("generations")
    save_tiny_model(folder / "untied", tiny_config("Qwen2"))
    save_tiny_model(folder / "tied", tiny_config("Gemma2", tie_word_embeddings=True, head_dim=8))
    save_tiny_model(folder / "lora", tiny_config("Llama"))
    save_tiny_adapter(folder / "lora", target_modules=["q_proj", "down_proj", "lm_head"])
    stops = {name: [greedy(opened(folder, name), PROMPTS[1], 9, [])[-1]] for name in ("untied", "tied", "lora")}
    (folder / "asked.json").write_text(json.dumps({"prompts": PROMPTS, "stops": stops, "limit": LIMIT}))
    return folder


def opened(folder: Path, name: str) -> Any:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / name, attn_implementation="eager")
    adapter = folder / name / "adapter"
    return (PeftModel.from_pretrained(model, adapter) if adapter.is_dir() else model).eval()


def test_every_layout_says_what_transformers_says(folder: Path) -> None:
    found = run_on_ranks(said_by_all, 2, folder)[0]
    stops = json.loads((folder / "asked.json").read_text())["stops"]
    expected = {
        name: [greedy(opened(folder, name), prompt, LIMIT - len(prompt), stops[name]) for prompt in PROMPTS]
        for name in stops
    }
    assert len(expected["untied"][1]) < LIMIT - 1 and max(map(len, expected["untied"])) > 20
    assert found == {layout: expected[name] for layout, (name, _) in LAYOUTS.items()}


def check_run(inputs: Path, out: Path) -> None:
    """samples.jsonl against the model of each checkpoint, from the text of the prompt on."""
    lines = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    val = f"{inputs}/val.parquet"
    assert [(line["step"], line["row"]) for line in lines] == [(s, f"{val} row {r}") for s in (2, 4) for r in range(3)]
    for line in lines:
        at = out / "checkpoints" / f"step_{line['step']:06}" / "hf"
        model = transformers.AutoModelForCausalLM.from_pretrained(at).eval()
        tokenizer = transformers.AutoTokenizer.from_pretrained(at)
        prompt = tokenizer(line["prompt"], add_special_tokens=False)["input_ids"]
        stops = model.generation_config.eos_token_id
        new = greedy(model, prompt, MAX_NEW_TOKENS, stops if isinstance(stops, list) else [stops])
        assert line["tokens"] == len(new)
        assert line["text"] == tokenizer.decode(new, skip_special_tokens=True)
        assert line["stopped"] == (len(new) < MAX_NEW_TOKENS)
        assert line["prompt"].endswith("<|im_start|>assistant\n") and line["expected"].endswith("<|im_end|>")


def test_a_run_writes_what_the_model_of_each_validation_says(tmp_path: Path) -> None:
    inputs = write_inputs(tmp_path / "inputs")
    silent = train_here(inputs, tmp_path / "silent", *KEYS[1:])
    spoken = train_here(inputs, tmp_path / "out", *KEYS, "trainer.logger=[tensorboard]")
    names = ("train/loss", "train/grad_norm", "val/loss")
    assert [[record.get(n) for n in names] for record in spoken] == [[r.get(n) for n in names] for r in silent]
    assert not (tmp_path / "silent" / "samples.jsonl").exists()
    check_run(inputs, tmp_path / "out")
    check_tensorboard(tmp_path / "out")
    assert find_run(tmp_path / "out") is not None


def check_tensorboard(out: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import TENSORS, EventAccumulator

    events = EventAccumulator(str(out / "tensorboard"), size_guidance={TENSORS: 0}).Reload()
    shown = events.Tensors("val/reply_0/text_summary")
    assert [event.step for event in shown] == [2, 4]
    assert "<|im_start|>assistant" in shown[0].tensor_proto.string_val[0].decode()


@pytest.mark.long
@pytest.mark.parametrize("more", [[], ["ulysses_sequence_parallel_size=2"], ["model.strategy=fsdp"]], ids=str)
def test_a_run_of_two_ranks_does_so_too(more: list[str], tmp_path: Path) -> None:
    inputs, out = write_inputs(tmp_path / "inputs"), tmp_path / "out"
    said = finish(start(inputs, out, *KEYS, *more, processes=2))
    assert status(out) == "finished", said
    assert len(read_metrics(out)) == 4
    check_run(inputs, out)

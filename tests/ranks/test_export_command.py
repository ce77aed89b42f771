"""`apollo-sft export`, and our folders opened as verl opens them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from apollo_sft.checkpoint.model_folder.tensor_files import read_base_tensors
from apollo_sft.cli.main import main
from tests.support.data import tiny_tokenizer
from tests.support.models import save_tiny_model, tiny_config
from tests.support.runs import train_here, write_inputs

LORA = ("model.lora_rank=3", "model.lora_alpha=6")
FEW = ("trainer.total_training_steps=4", "trainer.save_freq=2", "trainer.save_best_on=val/loss", "trainer.test_freq=2")
STOP = "<|im_end|>"
FAMILIES: dict[str, dict[str, Any]] = {
    "Qwen2": {"tie_word_embeddings": True},
    "Llama": {"tie_word_embeddings": False},
}


@pytest.fixture(scope="module", params=[(family, lora) for family in FAMILIES for lora in ("full", "lora")])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(the base, a finished run)."""
    family, how = request.param
    inputs = write_inputs(tmp_path_factory.mktemp("inputs"))
    config = tiny_config(family, vocab_size=360, dtype="bfloat16", **FAMILIES[family])
    save_tiny_model(inputs / "base", config, torch.bfloat16)
    tiny_tokenizer().save_pretrained(inputs / "base")
    out = inputs / "run"
    train_here(inputs, out, f"model.partial_pretrain={inputs / 'base'}", *FEW, *(LORA if how == "lora" else ()))
    return inputs / "base", out


def _model_files(folder: Path) -> dict[str, bytes]:
    names = ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    return {name: (folder / name).read_bytes() for name in [*names, "chat_template.jinja"]}


def test_the_last_checkpoint_gives_what_the_end_of_the_run_wrote(run: tuple[Path, Path], tmp_path: Path) -> None:
    _, out = run
    assert main(["export", str(out), str(tmp_path / "a")]) == 0
    assert _model_files(tmp_path / "a") == _model_files(out)
    assert main(["export", str(out / "checkpoints" / "latest"), str(tmp_path / "b")]) == 0
    assert _model_files(tmp_path / "b") == _model_files(out)


def test_any_step_the_best_one_and_another_dtype(run: tuple[Path, Path], tmp_path: Path) -> None:
    _, out = run
    assert main(["export", str(out), str(tmp_path / "two"), "--step", "2"]) == 0
    two = load_file(tmp_path / "two" / "model.safetensors")
    assert any(not torch.equal(two[name], tensor) for name, tensor in load_file(out / "model.safetensors").items())
    assert main(["export", str(out), str(tmp_path / "best"), "--step", "best", "--dtype", "fp32"]) == 0
    assert {spec.dtype for spec in read_base_tensors(tmp_path / "best").values()} == {"F32"}
    assert json.loads((tmp_path / "best" / "config.json").read_text())["dtype"] == "float32"
    assert main(["export", str(out), str(tmp_path / "best"), "--step", "2"]) == 0, "an earlier export gives way"
    assert (tmp_path / "best" / "model.safetensors").read_bytes() == (tmp_path / "two/model.safetensors").read_bytes()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_run_folder_opens_as_verl_opens_it(run: tuple[Path, Path], dtype: torch.dtype) -> None:
    """Path with a slash, config, tokenizer, model: the calls of its actor and reference workers."""
    base, out = run
    path = f"{out}/"
    config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    model, info = AutoModelForCausalLM.from_pretrained(
        pretrained_model_name_or_path=path, dtype=dtype, config=config, output_loading_info=True
    )
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
    names = {name for name, _ in model.named_parameters()}
    assert names == {name for name, _ in AutoModelForCausalLM.from_pretrained(base).named_parameters()}
    assert read_base_tensors(out) == read_base_tensors(base)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    stop = tokenizer.convert_tokens_to_ids(STOP)
    assert tokenizer.eos_token == STOP
    assert model.generation_config.eos_token_id == config.eos_token_id == stop
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "one"}], add_generation_prompt=True, tokenize=False
    )
    assert prompt.endswith("<|im_start|>assistant\n")


def test_nothing_is_replaced_that_no_export_wrote(run: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    base, out = run
    for folder, words in ((base, "no export wrote"), (out, "folder of a run"), (base / "config.json", "not a folder")):
        before = sorted(path.name for path in out.iterdir()), _model_files(base)
        assert main(["export", str(out), str(folder)]) == 2
        assert words in capsys.readouterr().err
        assert (sorted(path.name for path in out.iterdir()), _model_files(base)) == before


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["{run}", "--step", "77"], "step_000002, step_000004"),
        (["{base}"], "neither a checkpoint nor a run folder"),
        (["{run}", "--step", "newest"], "latest, best, or the number"),
        ([], "required: source"),
    ],
)
def test_what_is_not_there_is_refused(
    run: tuple[Path, Path], arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", *(text.format(base=run[0], run=run[1]) for text in arguments)]) == 2
    assert words in capsys.readouterr().err


def test_a_base_that_stores_a_tied_weight_twice_is_written_once(tmp_path: Path) -> None:
    inputs = write_inputs(tmp_path, tie_word_embeddings=True)
    file = inputs / "model" / "model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, file, {"format": "pt"})
    train_here(inputs, inputs / "run", "trainer.total_training_steps=1")
    assert set(read_base_tensors(inputs / "run")) == set(tensors)

"""Every shared dataset through `inspect` and three steps of training: nothing is lost that is not reported."""

import json
import math
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from apollo_sft.cli.main import main
from tests.support.models import save_tiny_model, tiny_config
from tests.support.runs import train_here

SHARED = Path(__file__).resolve().parents[3] / "shared"
CONTROLS = ["<|im_start|>", "<|im_end|>"]
MARKS = ["<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"]
"""Of the qwen3 tokenizer: tokens of their own, which are no control tokens."""
ROWS = 6
STEPS = 3

pytestmark = [
    pytest.mark.shared,
    pytest.mark.skipif(not SHARED.is_dir(), reason="the shared inputs folder is not beside the checkout"),
]


@cache
def model_folder(root: Path, name: str) -> Path:
    """A tiny model with a shared tokenizer, which has the control tokens of the templates."""
    tokenizer = AutoTokenizer.from_pretrained(SHARED / "tokenizers" / name)
    missing = [token for token in CONTROLS if token not in tokenizer.get_added_vocab()]
    tokenizer.add_tokens(MARKS)
    tokenizer.add_special_tokens({"additional_special_tokens": missing}, replace_extra_special_tokens=False)
    folder = root / name
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2}
    save_tiny_model(folder, tiny_config("Llama", vocab_size=len(tokenizer), max_position_embeddings=8192, **sizes))
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


def keys(models: Path, out: Path, file: Path, tokenizer: str, template: str | None) -> list[str]:
    multi = file.parent.name == "messages"
    given: dict[str, Any] = {
        "data.train_files": file,
        "data.val_files": "null",
        "data.train_max_samples": ROWS,
        "data.multiturn.enable": str(multi).lower(),
        "data.train_batch_size": 2,
        "data.micro_batch_size_per_gpu": 1,
        "data.max_length": 8192,
        "data.chat_template": "null" if template is None else SHARED / "templates" / f"{template}.jinja",
        "data.store_dir": out / "store",
        "model.partial_pretrain": model_folder(models, tokenizer),
        "trainer.total_training_steps": STEPS,
        "trainer.total_epochs": 9,
    }
    if not multi:
        given |= {f"data.{name}_key": "extra_info" for name in ("prompt", "response")}
        given |= {"data.prompt_dict_keys": "[question]", "data.response_dict_keys": "[answer]"}
    return [f"{key}={value}" for key, value in given.items()]


def said(message: dict[str, Any]) -> list[str]:
    """The names of its calls, and its other texts."""
    calls = [call["function"]["name"] for call in message.get("tool_calls") or ()]
    return calls + [text for text in (message.get("content"), message.get("reasoning_content")) if text]


def bare(text: str) -> str:
    """Without white space. phi3 decodes it to `▁` in places."""
    return "".join(text.replace("▁", " ").split())


@pytest.mark.parametrize(
    ("data", "tokenizer", "template"),
    [
        ("gsm8k/single_turn", "phi3", None),
        ("gsm8k/messages", "phi3", "phi3"),
        ("bfcl_toolcall/messages", "phi3", "qwen2_5"),
        ("lf_glaive_toolcall_en/messages", "phi3", "qwen3_instruct_2507"),
        ("lf_reason_tool_use/messages", "phi3", "qwen3"),
        ("taskmaster4/messages", "phi3", "qwen3"),
        ("taskmaster4/messages", "phi3", "smollm3"),
    ],
)
def test_every_turn_is_trained_or_reported(
    models: Path, tmp_path: Path, data: str, tokenizer: str, template: str | None
) -> None:
    file = SHARED / "data" / data / "train.parquet"
    given = keys(models, tmp_path, file, tokenizer, template)
    assert main(["inspect", *given, "--dump", str(tmp_path / "dump.jsonl")]) == 0
    samples = [json.loads(line) for line in (tmp_path / "dump.jsonl").read_text().splitlines()]
    assert all(sample["targets"] for sample in samples)

    metrics = train_here(Path(model_folder(models, tokenizer)).parent, tmp_path / "out", *given)
    losses = [line["train/loss"] for line in metrics if "train/loss" in line]
    assert len(losses) == STEPS
    assert all(math.isfinite(loss) for loss in losses)
    before = load_file(model_folder(models, tokenizer) / "model.safetensors")
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert any(not torch.equal(after[name].float(), before[name]) for name in before)

    ledger = [json.loads(line) for line in (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()]
    rows = pq.read_table(file).slice(0, ROWS).to_pylist()
    for row, content in enumerate(rows):
        of_row = [sample for sample in samples if sample["row"] == row]
        spoken = bare("".join("".join(sample["targets"]) for sample in of_row))
        reported = {turn for entry in ledger if entry["row"] == row for turn in entry["turns"]}
        messages = content.get("messages") or [{"role": "user"}, {"role": "assistant"}]
        turns = {index for index, message in enumerate(messages) if message["role"] == "assistant"}
        assert {turn for sample in of_row for turn in sample["turns"]} == turns
        unspoken = {turn for turn in turns if any(bare(text) not in spoken for text in said(messages[turn]))}
        assert unspoken == reported
    assert bool(ledger) == (template == "smollm3")

"""Base models on disk and the checks that every exported folder must pass."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from apollo_sft.checkpoint.model_folder.base_files import sort_files
from apollo_sft.checkpoint.model_folder.tensor_files import read_base_tensors
from apollo_sft.checkpoint.model_folder.write import AdapterFolder, ExportOptions
from apollo_sft.types import BaseModel
from tests.support.models import tiny_config, tiny_model

TEMPLATE = "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}"
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8}
CASES: dict[str, Callable[[], Any]] = {
    "qwen2-tied": lambda: tiny_config("Qwen2", tie_word_embeddings=True),
    "qwen2-untied": lambda: tiny_config("Qwen2", tie_word_embeddings=False),
    "llama-tied": lambda: tiny_config("Llama", tie_word_embeddings=True),
    "llama-untied": lambda: tiny_config("Llama", tie_word_embeddings=False),
    "qwen3-moe": lambda: tiny_config("Qwen3Moe", tie_word_embeddings=False, **MOE),
    "mixtral": lambda: tiny_config("Mixtral", tie_word_embeddings=False, num_local_experts=4),
}
IDS = torch.arange(3, 40).reshape(1, -1)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = ["<pad>", "<|start|>", "<|end|>"]
    trainer = trainers.BpeTrainer(vocab_size=90, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(["a question and an answer"] * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<pad>")


def base_on_disk(folder: Path, case: str, dtype: torch.dtype = torch.float32) -> BaseModel:
    tiny_model(CASES[case](), dtype).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return open_base(folder)


def open_base(folder: Path) -> BaseModel:
    config = json.loads((folder / "config.json").read_text())
    carried = sort_files(folder).carried
    return BaseModel(str(folder), folder, config, read_base_tensors(folder), carried=carried)


def adapter_folder(base: Path, config: Any) -> AdapterFolder:
    """What an adapter of the model in `base` is written with. `config`: PEFT's."""
    return AdapterFolder(config, BaseModel(str(base), base, {}, {}, carried=sort_files(base).carried), options())


def options(**changes: Any) -> ExportOptions:
    values: dict[str, Any] = {"tokenizer": tiny_tokenizer(), "chat_template": TEMPLATE, "stop_token_ids": (2,)}
    return ExportOptions(**(values | changes))


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=IDS, use_cache=False).logits
    return found


def open_exported(folder: Path) -> Any:
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype="auto", attn_implementation="eager", output_loading_info=True
    )
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model


def check_exported(folder: Path, base: BaseModel, live_logits: torch.Tensor) -> None:
    """Plain transformers gives the live model's logits bit for bit; the files' tensors are named as the base's."""
    assert torch.equal(logits(open_exported(folder)), live_logits)
    assert read_base_tensors(folder) == base.tensors
    config = json.loads((folder / "config.json").read_text())
    assert config["dtype"] == "float32"
    assert config["architectures"] == base.config["architectures"]
    assert AutoTokenizer.from_pretrained(folder).chat_template == TEMPLATE
    for path in folder.iterdir():
        if path.is_file():
            assert str(base.folder).encode() not in path.read_bytes(), f"{path.name} names a private path"

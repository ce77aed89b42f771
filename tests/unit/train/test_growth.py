"""model.add_special_tokens before a weight is read: what grows, what is refused, what is said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import Gemma3Config

from apollo_sft.checkpoint.model_folder.conversion import plan_export
from apollo_sft.config.compose import compose
from apollo_sft.config.schema import SftConfig
from apollo_sft.errors import CheckpointError, ConfigError, DataError
from apollo_sft.model import attention, load
from apollo_sft.train.base_model import open_base
from apollo_sft.train.check_model import check_model
from apollo_sft.train.prepare_run import prepare
from apollo_sft.types import BaseModel, TensorSpec
from tests.support.data import tiny_tokenizer
from tests.support.entry import Entry, assert_refused
from tests.support.models import save_tiny_model, tiny_config
from tests.support.runs import arguments, write_inputs

TURNS = "{% for m in messages %}<|turn|>{{ m.role }}\n{{ m.content }}<|stop|>{% endfor %}"
WRITES = f'data.chat_template="{TURNS}{{% if add_generation_prompt %}}<|turn|>assistant\\n{{% endif %}}"'
ADD = "model.add_special_tokens=true"


def config_of(inputs: Path, *more: str) -> SftConfig:
    return compose(arguments(inputs, inputs / "out", WRITES, *more)).config


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    """As many embeddings as the tokenizer has tokens."""
    return write_inputs(tmp_path, vocab_size=len(tiny_tokenizer()), tie_word_embeddings=False)


def test_tokens_are_refused_by_name_before_the_model_is_loaded(
    inputs: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = Entry(capfd, monkeypatch)(arguments(inputs, inputs / "out", WRITES))
    assert_refused(ended, "no token <|turn|>, <|stop|>", ADD, "data.chat_template=plain")


def test_the_model_grows_by_what_is_missing(inputs: Path, capfd: pytest.CaptureFixture[str]) -> None:
    held = len(tiny_tokenizer())
    base, hf_config = open_base(config_of(inputs, ADD))
    assert base.new_tokens is not None
    assert (base.new_tokens.tokens, base.new_tokens.ids) == (("<|turn|>", "<|stop|>"), (held, held + 1))
    assert (base.new_tokens.known, base.new_tokens.held, base.new_tokens.rows) == (held, held, held + 2)
    assert base.config["vocab_size"] == hf_config.vocab_size == held + 2
    found = prepare(config_of(inputs, ADD))
    assert found.train.summary.max_token_id == held + 1
    assert list(found.train.summary.stop_tokens) == [held + 1]
    assert len(found.tokenizer) == held + 2
    check_model(config_of(inputs, ADD))


def test_nothing_grows_where_nothing_is_missing(inputs: Path) -> None:
    base, hf_config = open_base(compose(arguments(inputs, inputs / "out", ADD)).config)
    assert base.new_tokens is None
    assert hf_config.vocab_size == len(tiny_tokenizer())


def test_embeddings_that_stand_for_nothing_are_taken_first(tmp_path: Path) -> None:
    held = len(tiny_tokenizer())
    inputs = write_inputs(tmp_path, vocab_size=held + 40)
    new_tokens = open_base(config_of(inputs, ADD))[0].new_tokens
    assert new_tokens is not None
    assert (new_tokens.ids, new_tokens.known, new_tokens.held, new_tokens.rows) == (
        (held, held + 1),
        held,
        held + 40,
        held + 40,
    )


def test_rows_without_a_token_between_old_and_new_ones_are_new_too(tmp_path: Path) -> None:
    """A tokenizer with one token more than its model has embeddings."""
    held = len(tiny_tokenizer()) - 1
    new_tokens = open_base(config_of(write_inputs(tmp_path, vocab_size=held), ADD))[0].new_tokens
    assert new_tokens is not None
    assert (new_tokens.ids, new_tokens.known, new_tokens.rows) == ((held, held + 1, held + 2), held, held + 3)


def test_the_text_part_of_a_larger_model_grows(inputs: Path) -> None:
    held = len(tiny_tokenizer())
    small = {"num_attention_heads": 2, "num_hidden_layers": 2, "hidden_size": 16, "intermediate_size": 16}
    config = Gemma3Config(text_config=small | {"vocab_size": held}, vision_config=small)
    config.save_pretrained(inputs / "model")
    base, hf_config = open_base(config_of(inputs, ADD))
    assert base.config["text_config"]["vocab_size"] == hf_config.get_text_config().vocab_size == held + 2
    assert "vocab_size" not in base.config
    assert json.loads((inputs / "model" / "config.json").read_text())["text_config"]["vocab_size"] == held


def test_an_adapter_on_a_grown_model_is_refused(inputs: Path) -> None:
    with pytest.raises(ConfigError, match=r"combined with LoRA[^$]*not saved anywhere[^$]*<\|turn\|>[^$]*lora_rank=0"):
        check_model(config_of(inputs, ADD, "model.lora_rank=2"))


def test_a_template_that_does_not_compile_is_refused_as_such(inputs: Path) -> None:
    with pytest.raises(DataError, match="does not compile"):
        prepare(compose(arguments(inputs, inputs / "out", 'data.chat_template="{% if %}"', ADD)).config)


@pytest.mark.parametrize("family", ["GPT2", "Qwen2", "Phi"])
def test_files_grow_by_embeddings_and_head_alone(tmp_path: Path, family: str) -> None:
    sizes: dict[str, Any] = {"n_positions": 256} if family == "GPT2" else {"tie_word_embeddings": False}
    held = len(tiny_tokenizer())
    inputs = write_inputs(tmp_path)
    save_tiny_model(inputs / "model", tiny_config(family, vocab_size=held, **sizes))
    base, hf_config = open_base(config_of(inputs, ADD))
    attention.register(attention.sdpa_kernel)
    model = load.build_on_meta(hf_config, load.torch.float32, False)
    plan = plan_export(model, base, "auto")
    changed = {name: spec.shape[0] for name, spec in plan.tensors.items() if spec != base.tensors[name]}
    assert set(changed.values()) == {held + 2}
    assert len(changed) == {"GPT2": 1, "Qwen2": 2, "Phi": 3}[family]
    name = next(name for name in base.tensors if name not in changed)
    odd = dict(base.tensors) | {name: TensorSpec((1, *base.tensors[name].shape), "F32")}
    with pytest.raises(CheckpointError, match="does not have the shape"):
        plan_export(model, BaseModel("x", base.folder, base.config, odd, base.new_tokens), "auto")

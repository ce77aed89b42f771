from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from apollo_sft.prepare.demo_model import write_base_model
from apollo_sft.prepare.word_problems import generate


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    write_base_model(folder, _texts(), seed=1)
    return folder


def _texts() -> list[str]:
    return [text for problem in generate(2000, 0, seed=1)[0] for text in (problem.question, problem.answer)]


def test_plain_transformers_opens_the_folder(folder: Path):
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert model.config.tie_word_embeddings
    assert model.config.vocab_size == len(tokenizer)
    assert 600_000 < model.num_parameters() < 900_000
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.pad_token == "<|endoftext|>"
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id


def test_the_reloaded_tokenizer_cuts_numbers_as_trained(folder: Path):
    """AutoTokenizer replaces the pre-tokenizer of some model types by its own; this one must survive."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for number in range(21):
        ids = tokenizer.encode(f" has {number} eggs", add_special_tokens=False)
        assert [tokenizer.decode([i]) for i in ids] == [" has ", str(number), " eggs"]


@pytest.mark.parametrize(
    "text", ["Ünïcode 世界 😀 e\u0301", " two  spaces\n\n\ttab ", "12345 - 7", "", "<|im_end|> as text"]
)
def test_any_text_survives(folder: Path, text: str):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_a_prompt_has_the_same_tokens_with_and_without_its_answer(folder: Path):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for problem in generate(0, 200, seed=9)[1]:
        user = {"role": "user", "content": problem.question}
        answer = {"role": "assistant", "content": problem.answer}
        prompt = tokenizer.apply_chat_template([user], add_generation_prompt=True, return_dict=False)
        whole = tokenizer.apply_chat_template([user, answer], return_dict=False)
        assert whole[: len(prompt)] == prompt
        reply = problem.answer + "<|im_end|>\n"
        assert whole[len(prompt) :] == tokenizer.encode(reply, add_special_tokens=False)


def test_seed_decides_the_weights_and_the_callers_generator_is_left_alone(folder: Path, tmp_path: Path):
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    write_base_model(tmp_path / "same", _texts(), seed=1)
    assert torch.equal(torch.rand(1), expected)
    write_base_model(tmp_path / "other", _texts(), seed=2)
    weights = [(path / "model.safetensors").read_bytes() for path in (folder, tmp_path / "same", tmp_path / "other")]
    assert weights[0] == weights[1]
    assert weights[0] != weights[2]

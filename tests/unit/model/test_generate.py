from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from apollo_sft.errors import DataError
from apollo_sft.model.generate import exact_match, final_answer, generate_answers, load_for_generation
from apollo_sft.prepare.demo_model import write_base_model
from apollo_sft.prepare.word_problems import generate


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    folder: Path = tmp_path_factory.mktemp("model")
    write_base_model(folder, [p.question for p in generate(300, 0, seed=1)[0]], seed=1)
    model, tokenizer = load_for_generation(folder)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():  # as made, the weights are so small that the model only repeats its last token
        for weight in model.parameters():
            weight.add_(torch.randn(weight.shape, generator=generator), alpha=0.15)
    return model.double(), tokenizer


@torch.no_grad()
def _greedy(model: Any, tokenizer: Any, messages: list[dict[str, str]], num_tokens: int) -> str:
    """One prompt, one token at a time, no cache, no padding."""
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    start = len(ids)
    for _ in range(num_tokens):
        token = int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())
        if token == tokenizer.eos_token_id:
            break
        ids.append(token)
    return tokenizer.decode(ids[start:], skip_special_tokens=True)


def test_batches_of_any_size_say_what_the_model_says_alone(loaded: tuple[Any, Any]):
    model, tokenizer = loaded
    questions = ["Hi", *(p.question for p in generate(0, 5, seed=2)[1]), "Ben has 3 eggs. " * 6]
    alone = [_greedy(model, tokenizer, [{"role": "user", "content": q}], 12) for q in questions]
    assert len(set(alone)) > 3
    for batch_size in (1, 3, 7):
        assert generate_answers(model, tokenizer, questions, max_new_tokens=12, batch_size=batch_size) == alone


def test_a_conversation_is_a_prompt_too(loaded: tuple[Any, Any]):
    model, tokenizer = loaded
    chat = [
        {"role": "user", "content": "Ben has 3 eggs."},
        {"role": "assistant", "content": "I see."},
        {"role": "user", "content": "How many?"},
    ]
    assert generate_answers(model, tokenizer, [chat], max_new_tokens=8) == [_greedy(model, tokenizer, chat, 8)]


def test_an_answer_ends_before_its_first_stop_token(loaded: tuple[Any, Any]):
    model, tokenizer = loaded
    questions = [p.question for p in generate(0, 4, seed=3)[1]]
    long = generate_answers(model, tokenizer, questions, max_new_tokens=12)
    ids = tokenizer.encode(long[0], add_special_tokens=False)
    stop = next(token for token in ids[1:] if tokenizer.decode([token]).strip().isalpha())
    stop_text = tokenizer.decode([stop])
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, stop]
    try:
        short = generate_answers(model, tokenizer, questions, max_new_tokens=12)
    finally:
        model.generation_config.eos_token_id = tokenizer.eos_token_id
    assert short[0] == long[0].split(stop_text)[0] != long[0]
    assert all(full.startswith(cut) and stop_text not in cut for full, cut in zip(long, short, strict=True))


def test_settings_for_sampling_in_the_folder_do_not_change_greedy_answers(loaded: tuple[Any, Any]):
    model, tokenizer = loaded
    question = ["Ben has 3 eggs."]
    plain = generate_answers(model, tokenizer, question, max_new_tokens=12)
    before = model.generation_config.to_dict()
    model.generation_config.update(do_sample=True, temperature=5.0, top_k=2, top_p=0.1, repetition_penalty=9.0)
    try:
        assert generate_answers(model, tokenizer, question, max_new_tokens=12) == plain
    finally:
        model.generation_config.update(**before)


def test_a_tokenizer_without_a_template_is_refused(loaded: tuple[Any, Any]):
    model, tokenizer = loaded
    template = tokenizer.chat_template
    tokenizer.chat_template = None
    try:
        with pytest.raises(DataError, match="no chat template"):
            generate_answers(model, tokenizer, ["Hi"])
    finally:
        tokenizer.chat_template = template


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("12 + 5 = 17\n#### 17", "17"),
        ("#### 1\nno, wait\n#### 1,234,567 ", "1234567"),
        ("####18\nand more talk 5", "18"),
        ("#### \n7", "7"),
        ("#### $1,000.", "1000"),
        (r"so \boxed{\frac{1}{2}} it is", r"\frac{1}{2}"),
        (r"\boxed{1} then \boxed{ x + 1 }", "x+1"),
        (r"#### 3 but really \boxed{4}", "4"),
        (r"\boxed{4} #### 3", "3"),
        (r"cut off \boxed{\frac{1}{2", r"\frac{1}{2"),
        ("(1,2)", None),
        (r"\boxed{(1,2)}", "(1,2)"),
        (r"\boxed{\left\{ x \right)} is half open", r"\left\{x\right)"),
        (r"\fbox{3} cm, not \boxed 7.", "7"),
        ("no answer 42", None),
        ("", None),
    ],
)
def test_final_answer(text: str, expected: str | None):
    assert final_answer(text) == expected


def test_exact_match_counts_final_answers_only():
    answers = ["so #### 14", "14", "#### 1,400", "#### 14.0", "####"]
    assert exact_match(answers, ["14", "14", "1400", "14", "14"]) == 2 / 5
    assert exact_match(["#### 14"], ["12 + 2 = 14\n#### 14"]) == 1
    with pytest.raises(AssertionError):
        exact_match(["#### 14"], [])

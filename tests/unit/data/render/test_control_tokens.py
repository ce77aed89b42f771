"""Control tokens that a template writes and a tokenizer lacks: found, refused by name, or added."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from apollo_sft.data.render.control_tokens import unknown_tokens, written_literals
from apollo_sft.data.render.template import CHATML, ChatTemplate
from apollo_sft.data.render.tokens import fit_template
from apollo_sft.data.store.fingerprint import tokenizer_hash
from apollo_sft.errors import DataError
from tests.support.data import data_config, tiny_tokenizer

SHARED = Path(__file__).resolve().parents[4].parent / "shared" / "tokenizers"


def bare() -> Any:
    """It knows <|im_start|> and <|im_end|> among others, and has no template."""
    tokenizer = copy.deepcopy(tiny_tokenizer())
    tokenizer.chat_template = None
    return tokenizer


def unknown(text: str, **changes: Any) -> list[str]:
    return unknown_tokens(bare(), ChatTemplate(text, "test"), data_config(**changes))


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (CHATML, []),
        ("<|im_start|>{{ messages[0].content }}<|stop|>", ["<|stop|>"]),
        ("{{ '<|b|>' + messages[0].content ~ '<|a|>' }}", ["<|b|>", "<|a|>"]),
        ("{% for m in messages %}{{ '<|' + m.role + '|>' + m.content }}{% endfor %}", ["<|system|>"]),
        ("{% for m in messages %}<|{{ m.role }}_{{ style }}|>{% endfor %}", "<|user_x|> <|assistant_x|> <|system_x|>"),
        ("{% if tools %}<|tools|>{% endif %}{{ messages[0].content }}", ["<|tools|>"]),
        ("<start_of_turn>{{ messages[0].content }}<end_of_turn></s><s>", "<start_of_turn> <end_of_turn> </s> <s>"),
        ("<\uff5cUser\uff5c>{{ messages[0].content }}<eos>", ["<\uff5cUser\uff5c>", "<eos>"]),
        ("{{ ('<|x|>' + messages[0].content) | replace('<|y|>', '') }}", ["<|x|>"]),
        ("{% if '<|x|>' in messages[0].content %}a{% endif %}{{ messages[0].content.split('<|y|>')[0] }}", []),
        ("{# <|x|> #}[INST] {{ messages[0].content }} [/INST] <b>|<a | b>", []),
        ("{{ raise_exception('no <|x|>') }}", []),
    ],
)
def test_what_a_template_writes(text: str, found: list[str] | str) -> None:
    wanted = found.split() if isinstance(found, str) else found
    assert unknown(text, apply_chat_template_kwargs={"style": "x"}) == wanted


def test_literals_come_in_their_order() -> None:
    assert [
        *written_literals("a{{ 'b' + x }}{% if y == 'n' %}c{{ f('n') }}{% else %}{{ 'd' | trim }}{% endif %}e")
    ] == [*"abcde"]


def test_they_are_refused_by_name_unless_the_template_is_the_tokenizers_own() -> None:
    text = "{% for m in messages %}<|turn|>{{ m.content }}<|stop|>{% endfor %}"
    with pytest.raises(DataError, match=r"no token <\|turn\|>, <\|stop\|>[^$]*model\.add_special_tokens=true"):
        fit_template(bare(), data_config(chat_template=text), add=False)
    tokenizer = bare()
    tokenizer.chat_template = text
    before = len(tokenizer)
    assert fit_template(tokenizer, data_config(chat_template=None), add=False).text == text
    assert fit_template(tokenizer, data_config(chat_template=text), add=False).text == text
    assert len(tokenizer) == before
    fit_template(tokenizer, data_config(chat_template=None), add=True)
    assert len(tokenizer) == before + 2


def test_added_they_are_one_special_token_each_and_another_tokenizer(tmp_path: Path) -> None:
    text = "{% for m in messages %}<|turn|>{{ m.content }}<|stop|>{% endfor %}"
    tokenizer = bare()
    before, hashed, specials = len(tokenizer), tokenizer_hash(tokenizer), tokenizer.special_tokens_map
    fit_template(tokenizer, data_config(chat_template=text), add=True)
    again = tokenizer_hash(tokenizer)
    assert again != hashed
    fit_template(tokenizer, data_config(chat_template=text), add=True)
    assert tokenizer_hash(tokenizer) == again
    assert tokenizer.special_tokens_map == specials
    tokenizer.save_pretrained(tmp_path)
    for found in (tokenizer, AutoTokenizer.from_pretrained(tmp_path)):
        ids = found("one<|turn|>two<|stop|>", add_special_tokens=False)["input_ids"]
        assert [token for token in ids if token >= before] == [before, before + 1]
        assert found.decode(ids, skip_special_tokens=True) == "onetwo"


def test_a_word_that_becomes_a_control_token_keeps_its_id() -> None:
    tokenizer = bare()
    word = next(word for word in tokenizer.get_vocab() if word.isalpha() and len(word) > 2)
    number = tokenizer.get_vocab()[word]
    tokenizer.add_tokens([word], special_tokens=True)
    assert tokenizer.get_vocab()[word] == number


@pytest.mark.shared
@pytest.mark.parametrize(("name", "found"), [("gpt2", ["<|im_start|>", "<|im_end|>"]), ("qwen3", []), ("smollm2", [])])
def test_published_tokenizers_and_chatml(name: str, found: list[str]) -> None:
    if not (SHARED / name).is_dir():
        pytest.skip("../shared/tokenizers is not here")
    tokenizer = AutoTokenizer.from_pretrained(SHARED / name)
    data = data_config(chat_template="chatml")
    assert unknown_tokens(tokenizer, ChatTemplate(CHATML, "test"), data) == found
    if not found:
        fit_template(tokenizer, data, add=False)

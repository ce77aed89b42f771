"""Fuzzed prompts and responses: the ids up to a target are those of its own generation prompt, or it is refused."""

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from apollo_sft.data.render.render import Rendered, Renderer
from apollo_sft.data.render.template import ChatTemplate, resolve_template
from apollo_sft.data.tally import Tally
from apollo_sft.errors import DataError
from apollo_sft.types import IGNORE_INDEX, Conversation, RowRef
from tests.support.data import CHATML, chat, data_config, tiny_tokenizer
from tests.unit.data.render import test_targets

BITS = [
    *["\n", " ", "  ", "\n\n", "\t", "\r\n", "\u00a0", "\u200b", "\u3000"],
    *[
        "a",
        "the",
        " answer",
        ".",
        "...",
        "!\n",
        "12",
        " 3",
        "assistant\n",
        "user",
        "system\n",
        "Assistant:",
        "### User:",
    ],
    *[
        "é",
        "e\u0301",
        "\u0301",
        "👩‍👧‍👦",
        "👍🏽",
        "\u200d",
        "\ufe0f",
        "二つ",
        "答",
        "ไม่",
        "ก็",
        "\u202e",
        "𝕏",
        "ﬁ",
        "Å",
        "\u212b",
    ],
    *["<", "|", "im_start", "<think>", "</think>", "[/INST]", "<|", "|>", "im_end|>"],
]


def pairs(count: int, seed: int) -> Iterator[list[dict[str, str]]]:
    draw = random.Random(seed)
    for _ in range(count):
        yield chat(*("".join(draw.choices(BITS, k=draw.randint(0, 6))) for _ in range(2)))


def check(one: Renderer, tokenizer: Any, count: int, seed: int) -> tuple[int, int]:
    """Assert that no target is shifted; (rows refused, turns cut)."""
    rows = [Conversation(messages, None, {}, RowRef("f", i)) for i, messages in enumerate(pairs(count, seed))]
    results = one.try_render(rows)
    with one.sandbox.bounded():
        laid_out = [
            one.layouts.lay_out(row).texts if isinstance(result, Rendered) else []
            for row, result in zip(rows, results, strict=True)
        ]
    for row, result, texts in zip(rows, results, laid_out, strict=True):
        if isinstance(result, DataError):
            continue
        [sample], [text] = result.samples, texts
        [span] = text.spans
        if span.start == 0:
            continue
        first = int(np.argmax(sample.labels != IGNORE_INDEX)) + 1
        prompt = text.text[: span.start]
        assert sample.input_ids[:first].tolist() == tokenizer(prompt, add_special_tokens=False)["input_ids"], row
        assert text.text[span.start : span.end].startswith(row.messages[1]["content"])
        reply = sample.labels[sample.labels != IGNORE_INDEX].tolist()
        alone = tokenizer(text.text[span.start : span.end], add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(reply).split() == tokenizer.decode(alone).split(), row
    return sum(isinstance(result, DataError) for result in results), one.counts.findings.get("cut_turns", Tally()).count


def tiny(template: str) -> tuple[Renderer, Any]:
    tokenizer = tiny_tokenizer()
    data = data_config(chat_template=template, special_tokens_in_content="allow")
    return Renderer(tokenizer, resolve_template(tokenizer, data), data), tokenizer


@pytest.mark.parametrize("template", [CHATML, "plain"])
def test_no_target_is_shifted(template: str) -> None:
    one, tokenizer = tiny(template)
    refused, cut = check(one, tokenizer, 1000, 0)
    assert refused == 0
    assert cut > 20


@pytest.mark.shared
@pytest.mark.long
@pytest.mark.skipif(not test_targets.SHARED.is_dir(), reason="the shared inputs folder is not beside the checkout")
@pytest.mark.parametrize("name", test_targets.TOKENIZERS)
def test_no_target_is_shifted_in_ten_thousand_pairs(name: str) -> None:
    tokenizer = test_targets.tokenizer(name)
    data = data_config(special_tokens_in_content="allow")
    for template in ("smollm2", "phi3", "mistral_nemo", "granite3_3"):
        text = (test_targets.SHARED / "templates" / f"{template}.jinja").read_text()
        one = Renderer(tokenizer, ChatTemplate(text, template), data)
        refused, cut = check(one, tokenizer, 2500, 1)
        print(f"{name}, {template}: 2,500 pairs, {cut} cut, {refused} refused")
        assert refused < 100

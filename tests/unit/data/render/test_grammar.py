"""Random templates and conversations: context and target of every reply are those of an oracle of its own."""

from __future__ import annotations

import random

import pytest

from apollo_sft.data.render.render import Renderer
from apollo_sft.data.render.template import ChatTemplate
from apollo_sft.types import Conversation, RowRef
from tests.support.data import data_config, tiny_tokenizer
from tests.support.grammar import conversation, draw

CONVERSATIONS = 3
"""Of each template."""


def wrong(seed: int) -> list[str]:
    """What differs from the oracle under one template."""
    rng = random.Random(seed)
    template = draw(rng)
    one = Renderer(tiny_tokenizer(), ChatTemplate(template.jinja(), "random"), data_config())
    found = []
    for number in range(CONVERSATIONS):
        messages = conversation(rng, reasoning=template.thinking in ("by_request", "always"))
        row = Conversation([dict(message) for message in messages], None, {}, RowRef(f"seed {seed}", number))
        expected = {}
        for index, message in enumerate(messages):
            if message["role"] == "assistant":
                expected[index] = template.turn(messages, index)

        with one.sandbox.bounded():
            texts = one.layouts.lay_out(row).texts
        for text in texts:
            for span in text.spans:
                got = (text.text[: span.start], text.text[span.start : span.end])
                if got != expected.pop(span.turn):
                    wanted = template.turn(messages, span.turn)
                    found.append(f"{row.ref} turn {span.turn} of {messages}\n{template}\n got {got}\nnot {wanted}")
        if expected:
            found.append(f"{row.ref}: no target for {sorted(expected)} of {messages}\n{template}")
    return found


def check(seeds: range) -> None:
    for seed in seeds:
        found = wrong(seed)
        assert not found, found[0]


def test_three_hundred_random_templates() -> None:
    check(range(300))


@pytest.mark.long
@pytest.mark.timeout(7200)
def test_twenty_thousand_random_templates() -> None:
    check(range(300, 20_300))

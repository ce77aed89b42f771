"""What is said in a row and is in none of its texts is named, whatever the template; nothing else is."""

from __future__ import annotations

from typing import Any

import pytest

from apollo_sft.data.render.render import Rendered, Renderer
from apollo_sft.data.render.template import ChatTemplate
from apollo_sft.types import Conversation, Message, RowRef
from tests.support.data import CHATML, chat, data_config, tiny_tokenizer

REF = RowRef("f.parquet", 7)
CALL = {"type": "function", "function": {"name": "add", "arguments": {"x": "one"}}}
CALLING: list[Message] = [
    *chat("one?"),
    {"role": "assistant", "content": "", "tool_calls": [CALL], "train": False},
    {"role": "tool", "content": "two"},
    *chat("", "two")[1:],
]
TOOLS = [{"type": "function", "function": {"name": "add", "description": "adds"}}]
KNOWN = CHATML.replace("{% for message in messages %}", "{% for message in messages if message.role in ROLES %}")


def lost(messages: list[Message], template: str, tools: Any = None, untrained: frozenset[int] = frozenset()) -> Any:
    one = Renderer(tiny_tokenizer(), ChatTemplate(template, "test"), data_config())
    [result] = one.try_render([Conversation(messages, tools, {}, REF, untrained)])
    assert isinstance(result, Rendered), result
    count = one.counts.findings["lost_parts"].count if "lost_parts" in one.counts.findings else 0
    assert (count > 0) == bool(result.lost)
    return {part.key: part.messages for part in result.lost}


@pytest.mark.parametrize("role", ["developer", "critic", "tool", "system"])
def test_a_message_that_the_template_leaves_out(role: str) -> None:
    known = KNOWN.replace("ROLES", "['user', 'assistant']")
    for said in ("be kind", "a", "b"):  # the last two stand in the text by chance
        messages = [{"role": role, "content": said}, *chat("a", "b")]
        assert lost(messages, known) == {"content": (0,)}
        assert lost(messages, CHATML) == {}


def test_tools_and_calls_that_the_template_leaves_out() -> None:
    with_tools = "{% for t in tools or [] %}{{ t.function.name }}{% endfor %}" + CHATML
    with_calls = CHATML.replace(
        "<|im_end|>", "{% for c in message.tool_calls or [] %}{{ c.function }}{% endfor %}<|im_end|>"
    )
    messages = [{key: value for key, value in message.items() if key != "train"} for message in CALLING]
    context = frozenset({1})
    assert lost(chat("a", "b"), CHATML, TOOLS) == {"tools": ()}
    assert lost(chat("a", "b"), with_tools, TOOLS) == {}
    assert lost(messages, CHATML, None, context) == {"tool_calls": (1,)}
    assert lost(messages, with_calls, None, context) == {}


def test_a_template_that_decides_by_what_is_said() -> None:
    decides = CHATML.replace(
        "{{ message['content'] }}", "{{ message['content'] if 'secret' not in message['content'] }}"
    )
    one = Renderer(tiny_tokenizer(), ChatTemplate(decides, "test"), data_config())
    rows = [Conversation(chat(text, "b"), None, {}, REF) for text in ("a", "a secret", "c")]
    found = [result.lost for result in one.try_render(rows) if isinstance(result, Rendered)]
    assert [[(part.key, part.messages) for part in lost] for lost in found] == [[], [("content", (0,))], []]


def test_reasoning_that_the_template_leaves_out_of_earlier_turns_by_design() -> None:
    block = "{% if message.reasoning_content and loop.last %}<think>{{ message.reasoning_content }}</think>{% endif %}"
    thinking = CHATML.replace("{{ message['content'] }}", block + "{{ message['content'] }}")
    messages: list[Message] = [*chat("a", "b", "c", "d")]
    messages[1] = messages[1] | {"reasoning_content": "hm hm"}
    one = Renderer(tiny_tokenizer(), ChatTemplate(thinking, "test"), data_config())
    [result] = one.try_render([Conversation(messages, None, {}, REF, frozenset({1}))])
    assert isinstance(result, Rendered)
    assert result.lost == []
    assert one.counts.findings["reasoning_left_out"].count == 1
    assert lost(messages, CHATML, None, frozenset({1})) == {"reasoning": (1,)}


def test_one_verdict_for_each_shape() -> None:
    one = Renderer(tiny_tokenizer(), ChatTemplate(CHATML, "test"), data_config())
    rows = [Conversation(chat(*texts), None, {}, REF) for texts in (("a", "b"), ("c", "d"), ("a", "b", "c", "d"))]
    one.try_render(rows)
    assert len(one.conservation._verdicts) == 2

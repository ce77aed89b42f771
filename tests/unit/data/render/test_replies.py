"""What of a reply a template leaves out, and what it makes the model write besides."""

from typing import Any

import pytest

from apollo_sft.data.render.render import Renderer
from apollo_sft.data.render.replies import missing_parts
from apollo_sft.data.render.template import resolve_template
from apollo_sft.data.tally import Tally
from apollo_sft.types import Conversation, RowRef
from tests.support.data import CHATML, chat, data_config, tiny_tokenizer

REF = RowRef("f", 0)


def call(name: str, **arguments: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def renderer(template: str) -> Renderer:
    tokenizer = tiny_tokenizer(template)
    data = data_config(True)
    return Renderer(tokenizer, resolve_template(tokenizer, data), data)


@pytest.mark.parametrize(
    ("message", "said", "missing"),
    [
        ({"content": " a  b"}, "a b<|im_end|>", ()),
        ({"content": 'say "x"\n'}, '{"text": "say \\"x\\"\\n"}', ()),
        ({"content": "ab"}, "a", ("content",)),
        ({"content": "", "thinking": "hm"}, "", ("reasoning",)),
        ({"content": "b", "tool_calls": [call("f")]}, "", ("content", "tool calls")),
        ({"content": "", "tool_calls": [call("f"), call("f")]}, "f", ("tool calls",)),
        ({"content": "", "tool_calls": [call("f", city="Rome")]}, "f{}", ("tool calls",)),
        ({"content": "", "tool_calls": [call("f", city="Rome", n=1, text="a 'b'")]}, "f(city=Rome)", ()),
    ],
)
def test_what_of_a_reply_is_missing(message: dict[str, Any], said: str, missing: tuple[str, ...]) -> None:
    assert missing_parts(message, said) == missing


def test_a_role_header_that_the_model_has_to_write_is_said() -> None:
    """The template ignores add_generation_prompt; where contents follow one another there is no header."""
    headless = "{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %}<|im_end|>{% endif %}{% endfor %}"
    for template, headers in ((CHATML.partition("{% if")[0], 2), (CHATML, 0), (headless, 0)):
        one = renderer(template)
        one.render([Conversation(chat("a", "b", "c", "d"), None, {}, REF)])
        assert one.counts.findings.get("trained_headers", Tally()).count == headers

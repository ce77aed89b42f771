from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from transformers.utils import chat_template_utils

from apollo_sft.data.render.sandbox import RenderError, Sandbox
from apollo_sft.data.render.template import ChatTemplate, resolve_template
from apollo_sft.errors import DataError
from tests.support.data import CHATML, chat, data_config, tiny_tokenizer


def rendered(tokenizer: Any, chat_template: str | None, messages: list[Any], generate: bool = False) -> str:
    template = resolve_template(tokenizer, data_config(chat_template=chat_template))
    return Sandbox(template, dict(tokenizer.special_tokens_map)).render(messages, None, {}, generate)


def test_null_is_the_tokenizer_s_own() -> None:
    template = resolve_template(tiny_tokenizer(), data_config())
    assert (template.text, template.source, template.tool_text) == (CHATML, "the tokenizer's own", None)
    named = tiny_tokenizer({"default": "d", "tool_use": "t"})
    template = resolve_template(named, data_config())
    assert (template.text_for(False), template.text_for(True)) == ("d", "t")


def test_a_path_jinja_text_and_the_built_in_names(tmp_path: Path) -> None:
    path = tmp_path / "mine.jinja"
    path.write_text("{{ messages[0].content }}!")
    tokenizer = tiny_tokenizer(None)
    assert rendered(tokenizer, str(path), chat("a")) == "a!"
    assert rendered(tokenizer, "{{ messages[0].content }}?", chat("a")) == "a?"
    dialogue = [{"role": "system", "content": "S"}, *chat("a", "b", "c", "d")]
    assert rendered(tokenizer, "plain", dialogue) == "Sab<|endoftext|>cd<|endoftext|>"
    assert rendered(tokenizer, "plain", dialogue[:2], generate=True) == "Sa"
    assert (
        rendered(tokenizer, "chatml", chat("a"), generate=True)
        == "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"
    )


def test_plain_begins_with_bos_where_the_tokenizer_adds_it() -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = tiny_tokenizer(None, bos_token="<|user|>")
    assert rendered(tokenizer, "plain", chat("a", "b")) == "ab<|endoftext|>"
    bos = ("<|user|>", tokenizer.bos_token_id)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<|user|> $A", special_tokens=[bos])
    assert rendered(tokenizer, "plain", chat("a", "b")) == "<|user|>ab<|endoftext|>"


@pytest.mark.parametrize(
    ("own", "wanted", "said"),
    [
        (None, None, ("data.chat_template", "chatml", "plain", "a path to a jinja file")),
        ({"tool_use": "t"}, None, ("named templates tool_use",)),
        (None, "chatlm", ("cannot be read as a file", "chatlm", "`chatml`")),
        (None, "{% if %}", ("does not compile", "line 1")),
    ],
)
def test_no_usable_template(own: Any, wanted: str | None, said: tuple[str, ...]) -> None:
    with pytest.raises(DataError) as caught:
        rendered(tiny_tokenizer(own), wanted, chat("a"))
    assert all(words in str(caught.value) for words in said)


def test_plain_without_an_end_token() -> None:
    class Bare:
        eos_token = None
        chat_template = None

    with pytest.raises(DataError, match="end token"):
        resolve_template(Bare(), data_config(chat_template="plain"))


def test_the_sandbox_refuses_what_is_not_the_user_s_and_reports_what_fails() -> None:
    with pytest.raises(DataError, match="messages is set by the trainer"):
        Sandbox(ChatTemplate(CHATML, "test"), {"messages": []})
    for text, said in (
        ("{{ raise_exception('no such role') }}", "no such role"),
        ("{{ messages[0].content + 1 }}", "TypeError"),
        ("{{ messages.append(1) }}", "SecurityError"),
        ("{{ ''.__class__.__mro__ }}", "SecurityError"),
    ):
        with pytest.raises(RenderError, match=said):
            Sandbox(ChatTemplate(text, "test"), {}).render(chat("a"), None, {}, False)


@pytest.mark.parametrize(
    "text",
    [
        "{{ m.role }}{{ m['content'] }}{{ m.nothing is defined }}{{ m.items() | list }}{{ m.get('role') }}",
        "{{ m['keys'] }}{% for t in tools %}{{ loop.first }}{{ loop.index0 }}{{ loop.length }}{{ loop.nextitem }}"
        "{{ t | tojson }}{{ t.function | tojson(indent=2) }}{{ t | tojson(sort_keys=true) }}{% endfor %}",
        "{% for t in tools %}{{ loop.cycle('a', 'b') }}{{ loop.changed(t) }}{{ loop.x is defined }}{% endfor %}",
        "{% set ns = namespace(i=1, f='{}'.format) %}{% set ns.i = ns.i + 1 %}{{ ns.i }}{{ ns.f('a') }}"
        "{{ ns.x is defined }}{{ ns.items is defined }}",
        "{% for x in (1, 2) %}{{ m.content.startswith('a') }}{{ m.content.replace('a', 'b').upper() }}"
        "{{ ', '.join(m) }}{{ '{0.__class__}{1}'.format(m, 1) }}{{ m.content.split('a', maxsplit=1) }}{% endfor %}",
        "{% set d = dict(a=1) %}{{ d | tojson }}{{ dict(a=2) | tojson }}{{ dict(a=1) | tojson }}{{ [1] | tojson }}",
        "{% for k, v in m | items %}{{ k }}{{ v | upper }}{% endfor %}{{ tools | tojson }}{{ tools[0].function.name }}",
    ],
)
def test_the_quicker_environment_renders_as_transformers_own(text: str) -> None:
    message = {"role": "user", "content": "a", "keys": "k"}
    tools = [{"type": "function", "function": {"name": n, "b": {"ü": [1, None]}, "a": 1}} for n in ("f", "g")]
    text = "{% set m = messages[0] %}" + text
    sandbox = Sandbox(ChatTemplate(text, "test"), {})
    theirs = chat_template_utils._compile_jinja_template(text)
    for given in (tools, tools[:1], [dict(tools[1])]):
        expected = theirs.render(messages=[message], tools=given)
        assert [sandbox.render([message], given, {}, False) for _ in range(2)] == [expected] * 2


@pytest.mark.parametrize(
    "text",
    [
        "{{ loop.__class__ }}",
        "{{ loop._iterator }}",
        "{{ m.__class__ }}",
        "{{ m.pop('role') }}",
        "{{ '{0.__class__}'.format(m)[:0] }}",
    ],
)
def test_the_quicker_environment_hides_what_the_sandbox_hides(text: str) -> None:
    sandbox = Sandbox(ChatTemplate("{% for m in messages %}" + text + ".x{% endfor %}", "test"), {})
    with pytest.raises(RenderError) if "pop" in text else nullcontext():
        assert sandbox.render(chat("a"), None, {}, False) == ".x"

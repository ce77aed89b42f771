"""Know the control tokens of a tokenizer and a template, and find them where a text must not have them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import jinja2
from transformers.utils import chat_template_utils

from apollo_sft.config.schema import DataConfig
from apollo_sft.data.render.sandbox import RenderError, RunawayError, Sandbox
from apollo_sft.data.render.template import ChatTemplate
from apollo_sft.types import Conversation, Message

CONTROL = re.compile(r"<[|\uff5c][^\s<>|\uff5c]+[|\uff5c]>|<(?:start|begin|end)_of_[a-z]+>|</?s>|<(?:bos|eos)>")
"""The spelling of control tokens: <|im_end|>, <\uff5cUser\uff5c>, <end_of_turn>, </s>, <eos>."""

PROBES: tuple[tuple[Message, ...], ...] = (
    ({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}),
    ({"role": "system", "content": "c"}, {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}),
)


class ControlTokenScan:
    """Finds text of a row that spells a token matched by `pattern`: the tokenizer would take it for that token."""

    def __init__(self, pattern: re.Pattern[str]) -> None:
        self.pattern = pattern
        self._tools: list[dict[str, Any]] | None = None
        """The tools that were scanned last: many rows in a row have the same object."""

        self._in_tools: str | None = None

    def first(self, conversation: Conversation) -> str | None:
        """Return the first such token and where it is, in words; None where there is none."""
        for index, message in enumerate(conversation.messages):
            found = self._first(message)
            if found is not None:
                return f"message {index} spells {found}"

        if conversation.tools is not self._tools:
            self._tools = conversation.tools
            self._in_tools = self._first(conversation.tools)
        if self._in_tools is None:
            return None
        return f"the tools spell {self._in_tools}"

    def _first(self, value: Any) -> str | None:
        texts: list[str] = []
        _collect_texts(value, texts)
        # One search over all texts: nearly always there is nothing to find. A match may span two of them, though.
        if not self.pattern.search("\n".join(texts)):
            return None

        for text in texts:
            match = self.pattern.search(text)
            if match is not None:
                return match.group()
        return None


def control_tokens(tokenizer: Any, template: ChatTemplate) -> tuple[str, ...]:
    """Return the tokens that can end a turn, longest first: special tokens, and added ones that the template writes."""
    texts = template.text + template.text_for(True)
    found = set(tokenizer.all_special_tokens)
    for token in tokenizer.added_tokens_decoder.values():
        if token.special or token.content in texts:
            found.add(token.content)
    return _longest_first(found)


def special_tokens(tokenizer: Any) -> re.Pattern[str]:
    """Return a pattern that matches the special tokens that text can spell, longest first."""
    found = set(tokenizer.all_special_tokens)
    found |= {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    # Such a tokenizer splits special tokens in text like any other text, so none can be spelled.
    if getattr(tokenizer, "split_special_tokens", False):
        found = set()
    return re.compile("|".join(map(re.escape, _longest_first(found))) or "(?!)")


def unknown_tokens(tokenizer: Any, template: ChatTemplate, data: DataConfig) -> list[str]:
    """Return the control tokens that a template writes and that are no added tokens, in the order of writing.

    They are found in its own text, and in renderings of short conversations, because some are put together.
    Raises: DataError for a template that does not compile.
    """
    sandbox = Sandbox(template, dict(tokenizer.special_tokens_map) | dict(data.apply_chat_template_kwargs))
    texts = [*written_literals(template.text_for(False)), *written_literals(template.text_for(True))]
    with sandbox.bounded():
        for probe in PROBES:
            with suppress(RenderError, RunawayError):
                texts.append(sandbox.render(probe, None, {}, add_generation_prompt=True))

    found: dict[str, None] = {}
    for text in texts:
        found.update(dict.fromkeys(CONTROL.findall(text)))
    known = tokenizer.get_added_vocab()
    return [token for token in found if token not in known]


def written_literals(text: str) -> Iterator[str]:
    """Yield the texts in a template that compiles, in their order, without those that it only compares with or gives
    to a function.
    """
    tree = chat_template_utils._compile_jinja_template(text).environment.parse(text)
    waiting: list[jinja2.nodes.Node] = [tree]
    while waiting:
        node = waiting.pop()
        if isinstance(node, jinja2.nodes.TemplateData):
            yield node.data
        elif isinstance(node, jinja2.nodes.Const) and isinstance(node.value, str):
            yield node.value

        if isinstance(node, jinja2.nodes.Filter):
            # Only what is filtered is written, not the arguments of the filter.
            waiting += [] if node.node is None else [node.node]
        elif not isinstance(node, jinja2.nodes.Compare | jinja2.nodes.Call | jinja2.nodes.Test):
            waiting += reversed(list(node.iter_child_nodes()))


def _longest_first(tokens: set[str]) -> tuple[str, ...]:
    return tuple(sorted(tokens - {""}, key=lambda text: (-len(text), text)))


def _collect_texts(value: Any, texts: list[str]) -> None:
    if isinstance(value, str):
        texts.append(value)
    elif isinstance(value, dict):
        texts.extend(value)
        for item in value.values():
            _collect_texts(item, texts)
    elif isinstance(value, list):
        for item in value:
            _collect_texts(item, texts)

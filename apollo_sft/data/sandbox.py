"""Templates come with models, so they are foreign code: they run in transformers' own jinja sandbox, which also makes
the text identical to `tokenizer.apply_chat_template(tokenize=False)`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jinja2
from transformers.utils import chat_template_utils

from apollo_sft.data.template import ChatTemplate
from apollo_sft.errors import DataError
from apollo_sft.types import Message

OURS = ("messages", "tools", "documents", "add_generation_prompt")


class RenderError(Exception):
    """A template that failed on one conversation."""


class Sandbox:
    """The compiled template. `kwargs` are template arguments: the tokenizer's special tokens and the user's own.

    Raises: DataError for a template that does not compile or an argument that is not the user's to give.
    """

    def __init__(self, template: ChatTemplate, kwargs: dict[str, Any]) -> None:
        for name in OURS:
            if name in kwargs:
                raise DataError(f"data.apply_chat_template_kwargs: {name} is set by the trainer")
        self.kwargs = kwargs
        self.plain = _compile(template.text, template.source)
        self.with_tools = _compile(template.text_for(True), template.source)

    def render(
        self,
        messages: Sequence[Message],
        tools: list[dict[str, Any]] | None,
        row_kwargs: dict[str, Any],
        add_generation_prompt: bool,
    ) -> str:
        """Raises: RenderError."""
        compiled = self.plain if tools is None else self.with_tools
        try:
            text: str = compiled.render(
                messages=messages,
                tools=tools,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self.kwargs | row_kwargs,
            )
        except Exception as error:  # foreign code may raise anything
            raise RenderError(f"{type(error).__name__}: {error}") from error
        return text


def _compile(text: str, source: str) -> Any:
    try:
        return chat_template_utils._compile_jinja_template(text)
    except jinja2.TemplateSyntaxError as error:
        raise DataError(
            f"the chat template does not compile ({source})", found=f"line {error.lineno}: {error.message}"
        ) from error


def with_reasoning_names(messages: Sequence[Message]) -> list[Message]:
    """Messages whose reasoning stands under every name that templates read.

    Source: what `apply_chat_template` of transformers 5.23 hands to a template.
    """
    return [_with_reasoning(message) for message in messages]


def _with_reasoning(message: Message) -> Message:
    names = ("reasoning_content", "thinking", "reasoning")
    reasoning = next((message[name] for name in names if message.get(name) is not None), None)
    if reasoning is None:
        return message
    return {"thinking": reasoning} | message | {"reasoning_content": reasoning}

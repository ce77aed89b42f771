"""Give messages the form in which a template reads them: names for reasoning, and styles of tool calls.

Templates differ in what they expect of a reply that calls a tool. In `{"content": "", "tool_calls": [{"function":
{"name": "add", "arguments": {"x": 1}}}]}` some want the empty content as null, some the arguments as JSON text. No
template declares which, so a renderer tries one `CallStyle` after another until the calls are in the text.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from enum import Enum
from typing import Any

from apollo_sft.types import REASONING_KEYS, Message

THINK_TAGS = ("<think>", "</think>")
"""The tags that data sets have around reasoning in a content."""


class CallStyle(Enum):
    """The form in which replies that call tools are given to the template, in the order in which they are tried."""

    PLAIN = "plain"
    """Empty content as "", arguments as a dict: what most templates expect."""

    NULL_CONTENT = "null_content"
    """Empty content as null."""

    JSON_ARGUMENTS = "json_arguments"
    """Arguments as JSON text."""

    NULL_CONTENT_AND_JSON_ARGUMENTS = "null_content_and_json_arguments"

    @property
    def has_null_content(self) -> bool:
        """Return whether empty content is given as null."""
        return self in (CallStyle.NULL_CONTENT, CallStyle.NULL_CONTENT_AND_JSON_ARGUMENTS)

    @property
    def has_json_arguments(self) -> bool:
        """Return whether arguments are given as JSON text."""
        return self in (CallStyle.JSON_ARGUMENTS, CallStyle.NULL_CONTENT_AND_JSON_ARGUMENTS)


def with_call_form(message: Message, style: CallStyle) -> Message:
    """Return a message with its tool calls in the form of `style`."""
    if "tool_calls" not in message or style is CallStyle.PLAIN:
        return message

    message = dict(message)
    if style.has_null_content and not message["content"]:
        message["content"] = None
    if style.has_json_arguments:
        message["tool_calls"] = [_with_json_arguments(call) for call in message["tool_calls"]]
    return message


def with_content_parts(message: Message) -> Message:
    """Return a message whose content is a list of one text part."""
    if not isinstance(message["content"], str):
        return message
    return message | {"content": [{"type": "text", "text": message["content"]}]}


def with_reasoning_names(messages: Sequence[Message], tags: Sequence[tuple[str, str]] = ()) -> list[Message]:
    """Return messages that have their reasoning under every name that templates read.

    `tags`: reasoning between such tags at the start of a content is taken out of it.
    Source: what `apply_chat_template` of transformers 5.23 gives to a template.
    """
    return [_with_reasoning(message, tags) for message in messages]


def reasoning_of(message: Message) -> str:
    """Return the reasoning that a message has under its own key, empty where it has none."""
    found = (message[name] for name in REASONING_KEYS if message.get(name))
    return next(found, "")


def has_reasoning(message: Message) -> bool:
    """Return whether a message has reasoning under its own key, or at the start of its content."""
    if reasoning_of(message).strip():
        return True
    content = message.get("content") or ""
    reasoning, _ = split_reasoning(content)
    return bool(reasoning.strip())


def split_reasoning(content: str, tags: Sequence[tuple[str, str]] = (THINK_TAGS,)) -> tuple[str, str | None]:
    """Return the reasoning at the start of a content and what follows it; "" and None where it has none."""
    begin = content.lstrip()
    for opening, closing in tags:
        if not begin.startswith(opening):
            continue
        reasoning, found, answer = begin.removeprefix(opening).partition(closing)
        if found:
            return reasoning.strip("\n"), answer.lstrip("\n")
    return "", None


def call_names(message: Message) -> list[str]:
    """Return the names of the functions that a message calls."""
    return [call.get("function", call)["name"] for call in message.get("tool_calls", ())]


def _with_reasoning(message: Message, tags: Sequence[tuple[str, str]]) -> Message:
    reasoning = reasoning_of(message)
    if not reasoning and tags and message["role"] == "assistant":
        reasoning, answer = split_reasoning(message["content"], tags)
        if answer is not None:
            message = message | {"content": answer}
    if not reasoning.strip():
        # Templates would write an empty block for a blank text (gpt-oss).
        return {name: value for name, value in message.items() if name not in REASONING_KEYS}
    return {"thinking": reasoning} | message | {"reasoning_content": reasoning}


def _with_json_arguments(call: dict[str, Any]) -> dict[str, Any]:
    function: dict[str, Any] = call.get("function", call)
    function = function | {"arguments": json.dumps(function["arguments"], ensure_ascii=False)}
    if "function" in call:
        return call | {"function": function}
    return function

"""Check that a rendering holds the content, the reasoning and the tool calls of a message of the row."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from typing import Any

from apollo_sft.types import REASONING_KEYS, Message


def missing_parts(message: Message, reply: str) -> tuple[str, ...]:
    """Return which of content, reasoning and tool calls of a message are not in the reply that the template wrote.

    White space may differ, and text may be escaped as in JSON. Of a call the name is looked for, and those texts among
    its arguments that are spelled alike in every notation.
    """
    missing = []
    if not is_in(message["content"], reply):
        missing.append("content")
    reasoning = next((message[name] for name in REASONING_KEYS if name in message), "")
    if not is_in(reasoning, reply):
        missing.append("reasoning")
    if "tool_calls" in message and not _has_calls(message, reply):
        missing.append("tool calls")
    return tuple(missing)


def is_in(part: str, reply: str) -> bool:
    """Return whether a part of a message is in a text; white space may differ, and it may be escaped as in JSON."""
    # The usual cases first: taking the white space out of long texts is slow.
    if part in reply or part.strip() in reply:
        return True

    bare_reply = _bare(reply)
    escaped = json.dumps(part, ensure_ascii=False)[1:-1]
    return _bare(part) in bare_reply or _bare(escaped) in bare_reply


def _bare(text: str) -> str:
    """Return a text without white space."""
    return "".join(text.split())


def _has_calls(message: Message, reply: str) -> bool:
    calls = [call.get("function", call) for call in message["tool_calls"]]
    names = Counter(call["name"] for call in calls)
    if any(reply.count(name) < count for name, count in names.items()):
        return False

    texts: list[str] = []
    for call in calls:
        texts += plain_texts(call.get("arguments"))
    return all(text in reply for text in texts)


def plain_texts(value: Any) -> Iterator[str]:
    """Yield the texts in a value that no notation has to escape."""
    if isinstance(value, str):
        if value.isalnum() and value.isascii():
            yield value
        return

    items = []
    if isinstance(value, dict):
        items = list(value.values())
    elif isinstance(value, list):
        items = value
    for item in items:
        yield from plain_texts(item)

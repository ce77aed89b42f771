"""Whether a rendering holds what a reply of the row says."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from typing import Any

from apollo_sft.data.render.sandbox import REASONING
from apollo_sft.types import Message


def missing_parts(message: Message, said: str) -> tuple[str, ...]:
    """Which of content, reasoning and tool calls of a message are not in what the template wrote of it.

    White space may differ, and text may stand there as in JSON. Of a call the name is looked for, and those texts
    among its arguments that are spelled alike in every notation.
    """
    missing = []
    if not _is_in(message["content"], said):
        missing.append("content")
    reasoning = next((message[name] for name in REASONING if name in message), "")
    if not _is_in(reasoning, said):
        missing.append("reasoning")
    if "tool_calls" in message and not _has_calls(message, said):
        missing.append("tool calls")
    return tuple(missing)


def _is_in(part: str, said: str) -> bool:
    if part in said or part.strip() in said:
        return True
    together = "".join(said.split())
    return "".join(part.split()) in together or "".join(json.dumps(part, ensure_ascii=False)[1:-1].split()) in together


def _has_calls(message: Message, said: str) -> bool:
    calls = [call.get("function", call) for call in message["tool_calls"]]
    names = Counter(call["name"] for call in calls)
    return all(said.count(name) >= count for name, count in names.items()) and all(
        text in said for call in calls for text in _plain_texts(call.get("arguments"))
    )


def _plain_texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        if value.isalnum() and value.isascii():
            yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _plain_texts(item)

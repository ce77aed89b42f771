"""Convert conversations of OpenAI, ShareGPT and others to messages as chat templates read them. No text is changed."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

from apollo_sft.data.read.messages import MASKS, MEDIA, REASONING_PARTS
from apollo_sft.prepare.columns import as_text
from apollo_sft.prepare.rejection import RejectedRow
from apollo_sft.types import REASONING_KEYS, Message

ROLES = {
    **{"user": "user", "human": "user"},
    **{"assistant": "assistant", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant"},
    **{"system": "system", "developer": "developer"},
    **{"tool": "tool", "function": "tool", "observation": "tool", "function_response": "tool"},
    "function_call": "assistant",
}
"""Roles of other formats, and ours."""

KEPT = (*REASONING_KEYS, "tool_call_id", "name", "enable_thinking")
"""Keys of a message that are written as they are; reasoning under its first name."""

READ = frozenset(
    ("role", "from", "content", "value", "tool_calls", "function_call", *KEPT, *MASKS, *MEDIA, *REASONING_PARTS)
)
"""Keys of a message that are written, in some form, or refused."""


def messages_of(value: Any, keeps_nulls: bool = False, left_out: Counter[str] | None = None) -> list[Message]:
    """Return the messages in a cell: a list of structs with `role`/`content` or `from`/`value`, or its JSON text.

    `keeps_nulls`: nulls are meant, as in JSON, where a columnar file fills missing fields with them. `left_out` counts
    the keys of messages that are not written.
    Raises: RejectedRow when the cell is no conversation, a turn is empty, or calls and outputs do not fit.
    """
    chat = value
    if isinstance(value, str):
        chat = _from_json(value)
        keeps_nulls = True
    if not isinstance(chat, list) or not chat or not all(isinstance(turn, dict) for turn in chat):
        raise RejectedRow("no conversation")

    messages = _joined_calls([_message(turn, keeps_nulls) for turn in chat])
    if left_out is not None:
        for turn in chat:
            left_out.update(f"messages.{key}" for key in turn if key not in READ and turn[key] is not None)
    if not any(message["role"] == "assistant" for message in messages):
        raise RejectedRow("no turn of the assistant")

    _link_calls(messages)
    return messages


def tools_of(value: Any, keeps_nulls: bool = False) -> str | None:
    """Return the tools in a cell as JSON text. Raises: RejectedRow when they are no list of objects."""
    tools = value
    if isinstance(value, str) and value.strip():
        tools = _from_json(value)
        keeps_nulls = True
    if not tools:
        return None

    if not isinstance(tools, list):
        raise RejectedRow("the tools are no list of objects")

    tools = [_from_json(tool) if isinstance(tool, str) else tool for tool in tools]
    if not all(isinstance(tool, dict) for tool in tools):
        raise RejectedRow("the tools are no list of objects")
    if not keeps_nulls:
        tools = without_nulls(tools)
    return json.dumps(tools, ensure_ascii=False)


def without_nulls(value: Any) -> Any:
    """Remove nulls: Arrow gives a struct the fields of all others, filled with null."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [without_nulls(item) for item in value]
    return value


def _message(turn: dict[str, Any], keeps_nulls: bool) -> Message:
    """Convert one turn. Raises: RejectedRow."""
    if not keeps_nulls:
        turn = without_nulls(turn)
    name = turn.get("role", turn.get("from"))
    role = None
    if isinstance(name, str):
        role = ROLES.get(name)
    if role is None:
        raise RejectedRow(f"an unknown role: {name!r}"[:80])
    if any(turn.get(medium) for medium in MEDIA):
        raise RejectedRow("images, videos or sound")

    content = _content(turn.get("content", turn.get("value")))
    calls = _calls(turn)
    if name == "function_call":  # ShareGPT: the text of the turn is the call
        calls = _from_json(content)
        content = ""
        if not isinstance(calls, list):
            calls = [calls]

    message: Message = {"role": role, "content": content or None}
    message |= {key: turn[key] for key in ("tool_call_id", "name", "enable_thinking") if turn.get(key) is not None}
    message |= _reasoning(turn) | _mask(turn)
    if calls:
        message["tool_calls"] = [_call(call) for call in calls]
    elif role == "tool" or message.get("train") is False:
        message["content"] = content  # a tool may well print nothing, and what is not trained may be empty
    elif not content.strip() and "reasoning_content" not in message:
        raise RejectedRow(f"an empty turn of the {role}")

    return message


def _reasoning(turn: dict[str, Any]) -> Message:
    """Return the reasoning of a turn under the name that is written. Raises: RejectedRow for parts without a text."""
    for key in REASONING_KEYS:
        if turn.get(key):
            return {"reasoning_content": turn[key]}
    for key, fields in REASONING_PARTS.items():
        texts = []
        for part in turn.get(key) or ():
            found = [part[name] for name in fields if isinstance(part, dict) and isinstance(part.get(name), str)]
            if not found:
                raise RejectedRow(f"a part of {key} is not text")
            texts.append(found[0])
        if texts:
            return {"reasoning_content": "".join(texts)}
    return {}


def _mask(turn: dict[str, Any]) -> Message:
    """Return what a turn says about its training, under the name that is written. Raises: RejectedRow."""
    said = {turn[key] for key in MASKS if turn.get(key) is not None}
    if not said:
        return {}
    if len(said) > 1 or not said <= {0, 1}:
        raise RejectedRow("keys about the training of a turn that are not one of true and false")
    return {"train": bool(said.pop())}


def _joined_calls(messages: list[Message]) -> list[Message]:
    """Join calls that follow one another, as ShareGPT writes parallel calls, into one message."""
    joined: list[Message] = []
    for message in messages:
        before = joined[-1] if joined else {}
        is_call = "tool_calls" in message and not message["content"]
        if is_call and "tool_calls" in before and not before["content"] and before.keys() == message.keys():
            before["tool_calls"] += message["tool_calls"]
        else:
            joined.append(message)
    return joined


def _calls(turn: dict[str, Any]) -> Any:
    """Return the tool calls of a turn: the list, or the one call of an older form."""
    calls = turn.get("tool_calls")
    if isinstance(calls, str) and calls.strip():
        calls = _from_json(calls)
    if calls:
        return calls
    if turn.get("function_call"):
        return [turn["function_call"]]
    return []


def _content(value: Any) -> str:
    """Return the text of a turn; of a list of parts, the texts joined. Raises: RejectedRow for other parts."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        return as_text(value)

    parts = [part.get("text") if isinstance(part, dict) else part for part in value]
    texts = [part for part in parts if isinstance(part, str)]
    if len(texts) < len(parts):
        raise RejectedRow("a part of a turn is not text")
    return "".join(texts)


def _call(call: Any) -> dict[str, Any]:
    """Return a call in the form of OpenAI. Raises: RejectedRow."""
    inner = None
    if isinstance(call, dict):
        inner = call.get("function", call)
    if not isinstance(inner, dict) or not isinstance(inner.get("name"), str):
        raise RejectedRow("a tool call without a function's name")

    arguments = inner.get("arguments") or {}
    if isinstance(arguments, str):
        arguments = _from_json(arguments)
    if not isinstance(arguments, dict):
        raise RejectedRow("the arguments of a tool call are no JSON object")

    function = {"name": inner["name"], "arguments": json.dumps(arguments, ensure_ascii=False)}
    return {"id": str(call.get("id") or ""), "type": "function", "function": function}


def _link_calls(messages: list[Message]) -> None:
    """Give an id to calls without one, and to each output the id of its call.

    Every output answers a call, and every call is answered before the next turn of another role; an output without an
    id may answer several calls at once. The conversation may end with a call.
    Raises: RejectedRow when that does not hold.
    """
    waiting: list[str] = []
    answers_all = False
    for number, message in enumerate(messages):
        if message["role"] == "tool":
            if not waiting:
                raise RejectedRow("an output without a call before it")
            answers_all = "tool_call_id" not in message
            identity = message.setdefault("tool_call_id", waiting[0])
            if identity not in waiting:
                raise RejectedRow("an output whose tool_call_id is not that of a call before it")
            waiting.remove(identity)
            continue
        # Another role continues: every call must have its output by now.
        if waiting and not answers_all:
            raise RejectedRow("a call without its output")
        waiting = [_identify(call, number, at) for at, call in enumerate(message.get("tool_calls", ()))]
        answers_all = False

    if waiting and messages[-1]["role"] == "tool" and not answers_all:
        raise RejectedRow("a call without its output")


def _identify(call: dict[str, Any], number: int, at: int) -> str:
    """Return the call's own id, or nine letters and digits: Mistral's templates require that form."""
    call["id"] = call["id"] or f"call{number:03d}{at:02d}"
    identity: str = call["id"]
    return identity


def _from_json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RejectedRow("a text that should be JSON is not") from error

"""Parse lists of messages, tools and the switch for thinking.

Only multi-turn data, prompts that are lists of messages, and classes of `data.custom_cls` need this module. It is
imported where it is used, so that other runs do not load it.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from apollo_sft.config.schema import DataConfig
from apollo_sft.data.read.cells import Place, brief, check_value, drop_nulls, parse_json, parse_truth
from apollo_sft.data.read.files import Row
from apollo_sft.errors import DataError
from apollo_sft.types import Message, RowRef

CACHED_TOOLS = 64
"""Different texts of a column of tools whose parsed form is kept."""


def multi_turn_messages(row: Row, ref: RowRef, data: DataConfig) -> list[Message]:
    """Return the messages of a multi-turn row, of which one at least is the assistant's."""
    place = Place(ref, data.multiturn.messages_key)
    cell = row[data.multiturn.messages_key]
    if isinstance(cell, str):
        cell = parse_json(cell, place)
    messages = parse_messages(cell, place)

    if not any(message["role"] == "assistant" for message in messages):
        roles = ", ".join(sorted({message["role"] for message in messages}))
        place.fail("no message of the assistant: nothing to train on", found=f"roles {roles}", expected="assistant")
    return messages


def thinking_kwargs(row: Row, ref: RowRef, data: DataConfig) -> dict[str, Any]:
    """Return the template arguments that the row's column for thinking gives; none where it is null."""
    key = data.multiturn.enable_thinking_key
    thinking = parse_truth(row.get(key), Place(ref, key), default=None)
    if thinking is None:
        return {}
    return {"enable_thinking": thinking}


def row_tools(row: Row, ref: RowRef, data: DataConfig) -> list[dict[str, Any]] | None:
    """Return the tools of a multi-turn row; the same object for the same JSON text, which many rows share."""
    key = data.multiturn.tools_key
    cell = row.get(key)
    if not isinstance(cell, str):
        return parse_tools(cell, Place(ref, key))

    try:
        return _tools_of_text(cell)
    except DataError:
        # The cache knows no place, so parse again for the same error with the place of this row.
        return parse_tools(cell, Place(ref, key))


def parse_messages(cell: Any, place: Place) -> list[Message]:
    """Return the messages in a cell.

    Raises: DataError naming file, row, column and message.
    """
    if cell is None:
        place.fail("the cell is null", expected="a list of messages")
    if not isinstance(cell, list):
        place.fail("the cell is not a list of messages", found=brief(cell))
    if not cell:
        place.fail("the list of messages is empty")
    return [_message(entry, place.of_message(index)) for index, entry in enumerate(cell)]


def parse_tools(cell: Any, place: Place) -> list[dict[str, Any]] | None:
    """Return the tools in a cell, which holds JSON text or a list; None where there are none."""
    tools = cell
    if isinstance(cell, str) and cell.strip():
        tools = parse_json(cell, place)
    if not tools:
        return None
    if not isinstance(tools, list):
        place.fail("not a list of tools", found=brief(tools))

    parsed = [parse_json(tool, place) if isinstance(tool, str) else tool for tool in tools]
    for tool in parsed:
        if not isinstance(tool, dict):
            place.fail("a tool is not an object", found=brief(tool))

    # A struct column unites the fields of all tools and fills the others with null. In JSON text a null is meant.
    if not isinstance(tools[0], str) and not isinstance(cell, str):
        parsed = [drop_nulls(tool) for tool in parsed]
    check_value(parsed, place)
    return parsed


@lru_cache(CACHED_TOOLS)
def _tools_of_text(text: str) -> list[dict[str, Any]] | None:
    return parse_tools(text, Place(RowRef("", 0), ""))


def _message(entry: Any, place: Place) -> Message:
    if not isinstance(entry, dict):
        place.fail("the message is not a struct", found=brief(entry), expected="{role, content}")

    # Arrow gives every message the keys of all messages, filled with null. Templates test whether a key is there.
    message = {key: value for key, value in entry.items() if value is not None}
    _check_role(message, entry, place)

    if "tool_calls" in message:
        calls = _tool_calls(message.pop("tool_calls"), place)
        if calls:
            message["tool_calls"] = calls

    if "content" not in message:
        if "tool_calls" not in message:
            found = "null" if "content" in entry else "no such key"
            place.fail(f"the {message['role']} message has no content", found=found)
        message["content"] = ""
    message["content"] = _content(message["content"], place)

    parse_truth(message.get("train"), place, default=True)
    check_value(message, place)
    return message


def _check_role(message: Message, entry: dict[str, Any], place: Place) -> None:
    role = message.get("role")
    if isinstance(role, str) and role:
        return

    hint = None
    if "from" in entry:
        hint = "rename `from`/`value` to `role`/`content`, `human`/`gpt` to `user`/`assistant`"
    place.fail("the message has no role", found=brief(entry), expected="a text, for example user", fix=hint)


def _content(content: Any, place: Place) -> str:
    """Return text, or the texts of a list of text parts joined: templates of text models would drop a list silently."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        place.fail("the content is not a text", found=brief(content))
    return "".join(_text_of_part(part, place) for part in content)


def _text_of_part(part: Any, place: Place) -> str:
    text = part
    if isinstance(part, dict) and part.get("type") in ("text", None):
        text = part.get("text")
    if not isinstance(text, str):
        place.fail("a part of the content is not a text", found=brief(part), expected='{"type": "text", "text": …}')
    return text


def _tool_calls(calls: Any, place: Place) -> list[Any]:
    if not isinstance(calls, list):
        place.fail("tool_calls is not a list", found=brief(calls))
    return [_tool_call(call, place) for call in calls]


def _tool_call(call: Any, place: Place) -> dict[str, Any]:
    """Return a call with its arguments as a dict, in the layout that it has: `{"function": {…}}` or flat."""
    if not isinstance(call, dict):
        place.fail("a tool call is not a struct", found=brief(call))
    call = drop_nulls(call)
    function: Any = call.get("function", call)
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        place.fail("a tool call has no function name", found=brief(call))

    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        # Some data sets write no arguments as an empty text, which is no JSON.
        arguments = parse_json(arguments, place) if arguments.strip() else {}
    if not isinstance(arguments, dict):
        place.fail("the arguments of a tool call are not an object", found=brief(arguments))

    parsed: dict[str, Any] = function | {"arguments": arguments}
    if "function" not in call:
        return parsed
    wrapped: dict[str, Any] = call | {"function": parsed}
    return wrapped

"""Parse lists of messages, tools and the switch for thinking.

Only multi-turn data, prompts that are lists of messages, and classes of `data.custom_cls` need this module. It is
imported where it is used, so that other runs do not load it.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from apollo_sft.config.schema import DataConfig
from apollo_sft.data.read.cells import SCALARS, Place, brief, check_value, drop_nulls, parse_json, parse_truth
from apollo_sft.data.read.files import Row
from apollo_sft.errors import DataError
from apollo_sft.types import REASONING_KEYS, RESERVED_ARGUMENTS, Message, RowRef

CACHED_TOOLS = 64
"""Different texts of a column of tools whose parsed form is kept."""

PLAIN_KEYS = frozenset(("role", "content"))

MASKS = ("train", "loss", "loss_mask", "trainable", "training", "weight", "loss_scale")
"""The names under which data sets say whether a message is trained: true or 1, false or 0."""

MEDIA = ("images", "image", "videos", "video", "audios", "audio")
"""Keys and columns of what no text model reads."""

CONVERT = "apollo-sft prepare custom --local_dataset_path FILE --local_save_dir FOLDER"
"""The command that converts conversations of other formats."""

REASONING_PARTS = {"reasoning_details": ("text", "summary"), "thinking_blocks": ("thinking",)}
"""Keys with a list of parts, and the keys of a part that hold its text."""

FOREIGN_ROLES = ("human", "gpt", "chatgpt", "bot", "function_call", "observation")
"""Roles of other formats that the command converts."""


def multi_turn_messages(row: Row, ref: RowRef, data: DataConfig) -> list[Message]:
    """Return the messages of a multi-turn row, of which one at least is the assistant's."""
    place = Place(ref, data.multiturn.messages_key)
    cell = row[data.multiturn.messages_key]
    if isinstance(cell, str):
        cell = parse_json(cell, place)
        place = place.of_json()
    messages = parse_messages(cell, place)

    if not any(message["role"] == "assistant" for message in messages):
        roles = sorted({message["role"] for message in messages})
        fix = None
        if any(role in FOREIGN_ROLES for role in roles):
            fix = f"{CONVERT} converts them"
        found = f"roles {', '.join(roles)}"
        place.fail("no message of the assistant: nothing to train on", found=found, expected="assistant", fix=fix)
    return messages


def with_system(messages: list[Message], row: Row, ref: RowRef, data: DataConfig) -> list[Message]:
    """Return messages that begin with the text of the row's column for the system message, where it has one."""
    place = Place(ref, data.system_key)
    text = row.get(data.system_key)
    if text is None or text == "":
        return messages
    if not isinstance(text, str):
        place.fail("not a text", found=brief(text), fix="data.system_key='' where the column means something else")

    check_value(text, place)
    if messages[0]["role"] != "system":
        return [{"role": "system", "content": text}, *messages]
    if messages[0]["content"] != text:
        place.fail(
            "the row has another system message among its messages",
            found=f"{brief(text)} and {brief(messages[0]['content'])}",
            expected="one of them",
            fix="data.system_key='' leaves the column out",
        )
    return messages


def template_kwargs(row: Row, ref: RowRef, data: DataConfig) -> dict[str, Any]:
    """Return the template arguments that the row's columns give."""
    place = Place(ref, data.template_kwargs_key)
    cell = row.get(data.template_kwargs_key)
    kwargs = cell
    if isinstance(cell, str) and cell.strip():
        kwargs = parse_json(cell, place)
    elif not place.keeps_nulls:
        kwargs = drop_nulls(cell)
    if kwargs is None or kwargs == "":
        kwargs = {}
    if not isinstance(kwargs, dict):
        place.fail("not a struct of template arguments", found=brief(kwargs), expected='{"enable_thinking": false}')

    check_value(kwargs, place)
    for name in RESERVED_ARGUMENTS:
        if name in kwargs:
            place.fail(f"{name} is set by the trainer", found=brief(kwargs))

    thinking = thinking_kwargs(row, ref, data)
    differing = [name for name in thinking if kwargs.get(name, thinking[name]) != thinking[name]]
    if differing:
        place.fail(
            f"it contradicts the column {data.multiturn.enable_thinking_key}",
            found=f"{kwargs} and {thinking}",
        )
    return kwargs | thinking


def refuse_media(row: Row, ref: RowRef) -> None:
    """Refuse a row with images, videos or sound: a text model would be trained without them."""
    for name in MEDIA:
        if row.get(name):
            _refuse_media(Place(ref, name), row[name])


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
    if not isinstance(tools[0], str) and not isinstance(cell, str) and not place.keeps_nulls:
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
    # Most messages have no other key, and all of them pass here.
    if not message.keys() <= PLAIN_KEYS:
        _read_other_keys(message, place)
    if message["role"] == "function":  # the older form of a tool
        message["role"] = "tool"
    if "content" not in message:
        if "tool_calls" not in message and not any(message.get(key) for key in REASONING_KEYS):
            found = "null" if "content" in entry else "no such key"
            place.fail(f"the {message['role']} message has no content", found=found)
        message["content"] = ""
    message["content"] = _content(message["content"], place)

    check_value(message, place)
    return message


def _read_other_keys(message: Message, place: Place) -> None:
    """Read what a message holds besides role and content."""
    for name in MEDIA:
        if message.get(name):
            _refuse_media(place, message[name])

    _read_calls(message, place)
    _read_reasoning(message, place)
    _read_mask(message, place)
    parse_truth(message.get("enable_thinking"), place, default=None)
    for key, value in message.items():
        # What a columnar file adds (times, bytes) is nothing that a template would read.
        if key not in ("role", "content", "tool_calls") and not isinstance(value, (*SCALARS, list, dict)):
            message[key] = str(value)


def _read_calls(message: Message, place: Place) -> None:
    """Bring tool calls into the key `tool_calls`, a list with arguments as dicts, and the older form with them."""
    calls = message.pop("tool_calls", None)
    if isinstance(calls, str):
        text = calls.strip()
        calls = parse_json(text, place) if text else []
        place = place.of_json()
    call = message.pop("function_call", None)
    if call:
        if calls:
            place.fail("the message has both tool_calls and function_call", found=brief(call), expected="one of them")
        calls = [{"type": "function", "function": call}]

    if calls is not None:
        parsed = _tool_calls(calls, place)
        if parsed:
            message["tool_calls"] = parsed


def _read_reasoning(message: Message, place: Place) -> None:
    """Bring the reasoning in lists of parts (`reasoning_details`, `thinking_blocks`) into `reasoning_content`."""
    for name, fields in REASONING_PARTS.items():
        if name not in message:
            continue
        parts = message.pop(name)
        if not isinstance(parts, list):
            place.fail(f"{name} is not a list", found=brief(parts))
        text = "".join(_reasoning_of_part(part, name, fields, place) for part in parts)
        named = next((message[key] for key in REASONING_KEYS if message.get(key)), text)
        if text and named != text:
            place.fail(
                f"the message has two different reasonings, one in {name}", found=f"{brief(named)}, {brief(text)}"
            )
        if text:
            message["reasoning_content"] = text

    for key in REASONING_KEYS:
        if not isinstance(message.get(key, ""), str):
            place.fail(f"{key} is not a text", found=brief(message[key]))


def _reasoning_of_part(part: Any, name: str, fields: tuple[str, ...], place: Place) -> str:
    texts = [part[key] for key in fields if isinstance(part, dict) and isinstance(part.get(key), str)]
    if not texts:
        place.fail(f"a part of {name} is not a text", found=brief(part), expected=f"one with {' or '.join(fields)}")
    return str(texts[0])


def _read_mask(message: Message, place: Place) -> None:
    """Bring what a message says about its training into the key `train`."""
    said = {name: _truth_of_mask(name, message.pop(name), place) for name in MASKS if name in message}
    if not said:
        return
    if len(set(said.values())) > 1:
        words = ", ".join(f"{name} {value}" for name, value in said.items())
        place.fail("two keys of the message contradict each other about its training", found=words)
    message["train"] = next(iter(said.values()))


def _truth_of_mask(name: str, value: Any, place: Place) -> bool:
    if not isinstance(value, bool) and value not in (0, 1):
        place.fail(
            f"{name} is neither 0 nor 1",
            found=brief(value),
            expected="true or 1 (trained), false or 0 (context): other weights are not supported",
        )
    return bool(value)


def _refuse_media(place: Place, value: Any) -> None:
    place.fail(
        "images, videos and sound are not supported: a text model would be trained without them",
        found=brief(value),
        expected="text only",
    )


def _check_role(message: Message, entry: dict[str, Any], place: Place) -> None:
    role = message.get("role")
    if isinstance(role, str) and role:
        return

    hint = None
    if "from" in entry:
        hint = f"{CONVERT} converts `from`/`value`, `human`/`gpt` and calls to `role`/`content`"
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
    if isinstance(part, dict):
        kind = part.get("type")
        if kind in ("text", None):
            text = part.get("text")
        elif any(medium in str(kind) for medium in ("image", "video", "audio")):
            _refuse_media(place, part)
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
    if not place.keeps_nulls:
        call = drop_nulls(call)
    function: Any = call.get("function", call)
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        place.fail("a tool call has no function name", found=brief(call))

    arguments = function.get("arguments")
    if arguments is None:
        arguments = {}
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

"""Parse a row into a validated Conversation. Single-turn and multi-turn data meet here.

A single-turn row `{"question": "1 + 1?", "answer": "2"}` and a multi-turn row `{"messages": [...]}` give the same
conversation: a user message and an assistant message, of plain JSON values only, as templates expect them.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from apollo_sft.config.schema import DataConfig
from apollo_sft.data.read.cells import Place, brief, check_value, parse_truth
from apollo_sft.data.read.files import Columns, Row
from apollo_sft.errors import DataError
from apollo_sft.types import Conversation, Message, RowRef

OTHER_COLUMNS = ("images", "image", "videos", "video", "audios", "audio", "input")
"""Columns that no key names and that hold what is said in a row: they are read so that they are not lost unseen."""


def needed_columns(data: DataConfig) -> Columns:
    """Return the columns that `parse_row` reads."""
    multiturn = data.multiturn
    keys = {data.prompt_key: "data.prompt_key", data.response_key: "data.response_key"}
    if multiturn.enable:
        keys = {multiturn.messages_key: "data.multiturn.messages_key"}

    named = (multiturn.tools_key, multiturn.enable_thinking_key, data.template_kwargs_key, data.system_key)
    optional = dict.fromkeys((*named, data.train_key, *OTHER_COLUMNS))
    return Columns(tuple(keys), tuple(name for name in optional if name and name not in keys), keys)


def check_conversation(conversation: Conversation) -> Conversation:
    """Check a conversation that a class of the user's made, as `parse_row` checks a row.

    Raises: DataError naming file, row and message.
    """
    from apollo_sft.data.read.messages import parse_messages, parse_tools

    messages = parse_messages(conversation.messages, Place(conversation.ref, "messages", keeps_nulls=True))
    untrained = _pop_untrained(messages)
    thinking = dict(conversation.thinking) | _pop_thinking(messages)
    tools = parse_tools(conversation.tools, Place(conversation.ref, "tools", keeps_nulls=True))
    check_value(conversation.template_kwargs, Place(conversation.ref, "template_kwargs"))
    untrained |= conversation.untrained
    return replace(conversation, messages=messages, tools=tools, untrained=untrained, thinking=thinking)


def parse_row(row: Row, ref: RowRef, data: DataConfig) -> Conversation:
    """Return the conversation in one row.

    Raises: DataError naming file, row, column and message.
    """
    try:
        if data.multiturn.enable:
            return _parse_multi_turn(row, ref, data)
        return _parse_single_turn(row, ref, data)
    except RecursionError as error:
        raise DataError(f"{ref}: a cell is nested too deeply") from error


def parse_prompt(row: Row, ref: RowRef, data: DataConfig) -> list[Message]:
    """Return the messages of the prompt of a single-turn row, which may lack its response.

    Raises: DataError naming file, row, column and message.
    """
    place = Place(ref, data.prompt_key)
    path = tuple(data.prompt_dict_keys or ())
    prompt = _text_or_list(row[data.prompt_key], path, place, "data.prompt_dict_keys")
    if isinstance(prompt, str):
        return [_text_message("user", prompt, place)]

    from apollo_sft.data.read.messages import parse_messages

    messages = parse_messages(prompt, place)
    if messages[-1]["role"] != "user":
        place.fail("the last message of a prompt must be the user's", found=f"role {messages[-1]['role']!r}")
    return messages


def _parse_multi_turn(row: Row, ref: RowRef, data: DataConfig) -> Conversation:
    from apollo_sft.data.read.messages import multi_turn_messages

    return _with_columns(multi_turn_messages(row, ref, data), row, ref, data)


def _parse_single_turn(row: Row, ref: RowRef, data: DataConfig) -> Conversation:
    messages = [*parse_prompt(row, ref, data), *_parse_response(row, ref, data)]
    unread: tuple[str, ...] = ()
    if row.get("input") and "input" not in (data.prompt_key, data.response_key):
        unread = ("input",)
    return replace(_with_columns(messages, row, ref, data), unread=unread)


def _with_columns(messages: list[Message], row: Row, ref: RowRef, data: DataConfig) -> Conversation:
    """Return the conversation of these messages and the row's other columns."""
    tools = None
    kwargs: dict[str, Any] = {}
    # Rows of two texts have none of these, and need no module for them.
    columns = (data.multiturn.tools_key, data.multiturn.enable_thinking_key, data.template_kwargs_key, data.system_key)
    if any(row.get(name) is not None for name in (*columns, *OTHER_COLUMNS)):
        from apollo_sft.data.read import messages as parse

        parse.refuse_media(row, ref)
        messages = parse.with_system(messages, row, ref, data)
        tools = parse.row_tools(row, ref, data)
        kwargs = parse.template_kwargs(row, ref, data)

    untrained = _untrained(messages, row, ref, data)
    return Conversation(messages, tools, kwargs, ref, untrained, _pop_thinking(messages))


def _parse_response(row: Row, ref: RowRef, data: DataConfig) -> list[Message]:
    place = Place(ref, data.response_key)
    path = tuple(data.response_dict_keys or ())
    response = _text_or_list(row[data.response_key], path, place, "data.response_dict_keys")
    if isinstance(response, str):
        return [_text_message("assistant", response, place)]

    from apollo_sft.data.read.messages import parse_messages

    answer = parse_messages(response, place)
    if not any(message["role"] == "assistant" for message in answer):
        place.fail("the response must be a text, or messages with one of the assistant", found=brief(response))
    return answer


def _untrained(messages: list[Message], row: Row, ref: RowRef, data: DataConfig) -> frozenset[int]:
    """Return the indices of the messages that the row takes out of training: some of them, or all."""
    untrained = _pop_untrained(messages)
    other_column = "data.train_key='' where the column means something else"
    is_trained = parse_truth(row.get(data.train_key), Place(ref, data.train_key), default=True, fix=other_column)
    if not is_trained:
        return frozenset(range(len(messages)))
    return untrained


def _pop_untrained(messages: list[Message]) -> frozenset[int]:
    """Remove the key `train` of all messages: it is meant for the trainer, templates must not see it."""
    return frozenset(index for index, message in enumerate(messages) if not message.pop("train", True))


def _pop_thinking(messages: list[Message]) -> dict[int, bool]:
    """Remove the key `enable_thinking` of all messages: it chooses how a reply is rendered."""
    return {i: message.pop("enable_thinking") for i, message in enumerate(messages) if "enable_thinking" in message}


def _text_or_list(cell: Any, path: tuple[str, ...], place: Place, key: str) -> str | list[Any]:
    """Return the text, or the list of messages, in `cell`. `path` is followed only where the cell is a struct.

    A list of one is taken for its element where that is a text or holds the first key of the path.
    """
    if cell is None:
        place.fail("the cell is null", expected="a text")
    # Some data sets wrap each answer in a list of one. A list of one message is a list of messages, though.
    if isinstance(cell, list) and len(cell) == 1:
        only = cell[0]
        if isinstance(only, str) or (isinstance(only, dict) and path and path[0] in only):
            cell = only

    if isinstance(cell, str | list):
        return cell
    if not isinstance(cell, dict):
        place.fail("the cell is neither text nor a struct", found=brief(cell))
    if not path:
        example = next(iter(cell), "field")
        place.fail("the cell is a struct", found=f"fields {', '.join(cell)}", fix=f"{key}=[{example}]")
    return _follow(cell, path, place, key)


def _follow(cell: dict[str, Any], path: tuple[str, ...], place: Place, key: str) -> str:
    """Return the text at the end of `path` in a struct."""
    value: Any = cell
    where = place.column
    for name in path:
        if not isinstance(value, dict):
            place.fail(f"{where} is not a struct", found=brief(value), fix=f"shorten {key}")
        if name not in value:
            place.fail(f"{where} has no field {name!r} ({key})", found=f"fields {', '.join(value)}")
        value = value[name]
        where = f"{where}[{name}]"

    if not isinstance(value, str):
        place.fail(f"{where} is not a text", found=brief(value), fix=f"set {key} to a path that ends in a text")
    return value


def _text_message(role: str, text: str, place: Place) -> Message:
    check_value(text, place)
    return {"role": role, "content": text}

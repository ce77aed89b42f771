"""Row -> validated Conversation. Single-turn and multi-turn data meet here; templates see plain JSON values only."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from functools import lru_cache
from itertools import chain
from typing import Any, NoReturn

from apollo_sft.config.schema import DataConfig
from apollo_sft.data.read.files import Columns, Row
from apollo_sft.errors import DataError
from apollo_sft.types import Conversation, Message, RowRef

KEPT_TOOLS = 64
MOST_LEVELS = 100
SCALARS = (str, int, float, bool, type(None))


def needed_columns(data: DataConfig) -> Columns:
    """The columns that `parse_row` reads."""
    multiturn = data.multiturn
    if multiturn.enable:
        return Columns(
            required=(multiturn.messages_key,),
            optional=_named(multiturn.tools_key, multiturn.enable_thinking_key, data.train_key),
            keys={multiturn.messages_key: "data.multiturn.messages_key"},
        )
    keys = {data.response_key: "data.response_key", data.prompt_key: "data.prompt_key"}
    return Columns(required=(data.prompt_key, data.response_key), optional=_named(data.train_key), keys=keys)


def check_conversation(conversation: Conversation) -> Conversation:
    """A conversation that was not parsed here, held to what `parse_row` gives.

    Raises: DataError naming file, row and message.
    """
    at = _Place(conversation.ref, "messages")
    messages = _messages(conversation.messages, at)
    untrained = {i for i, message in enumerate(messages) if not message.pop("train", True)}
    tools = _parsed_tools(conversation.tools, _Place(conversation.ref, "tools"))
    _check_value(conversation.template_kwargs, _Place(conversation.ref, "template_kwargs"))
    return replace(conversation, messages=messages, tools=tools, untrained=conversation.untrained | untrained)


def _named(*names: str) -> tuple[str, ...]:
    return tuple(name for name in names if name)


def parse_row(row: Row, ref: RowRef, data: DataConfig) -> Conversation:
    """The conversation in one row.

    Raises: DataError naming file, row, column and message.
    """
    try:
        return _conversation(row, ref, data)
    except RecursionError as error:
        raise DataError(f"{ref}: a cell is nested too deeply") from error


def _conversation(row: Row, ref: RowRef, data: DataConfig) -> Conversation:
    messages = _multi_turn(row, ref, data) if data.multiturn.enable else _single_turn(row, ref, data)
    untrained = frozenset(i for i, message in enumerate(messages) if not message.pop("train", True))
    other_column = "data.train_key='' where the column means something else"
    if not _truth(row.get(data.train_key), _Place(ref, data.train_key), True, other_column):
        untrained = frozenset(range(len(messages)))
    tools, kwargs = _tools_and_kwargs(row, ref, data) if data.multiturn.enable else (None, {})
    return Conversation(messages, tools, kwargs, ref, untrained)


def parse_prompt(row: Row, ref: RowRef, data: DataConfig) -> list[Message]:
    """The messages of the prompt of a single-turn row, which may lack its response.

    Raises: DataError naming file, row, column and message.
    """
    at = _Place(ref, data.prompt_key)
    prompt = _descend(row[data.prompt_key], tuple(data.prompt_dict_keys or ()), at, "data.prompt_dict_keys")
    if isinstance(prompt, str):
        return [_text_message("user", prompt, at)]
    messages = _messages(prompt, at)
    if messages[-1]["role"] != "user":
        at.fail("the last message of a prompt must be the user's", found=f"role {messages[-1]['role']!r}")
    return messages


def _single_turn(row: Row, ref: RowRef, data: DataConfig) -> list[Message]:
    messages = parse_prompt(row, ref, data)
    at = _Place(ref, data.response_key)
    response = _descend(row[data.response_key], tuple(data.response_dict_keys or ()), at, "data.response_dict_keys")
    if not isinstance(response, str):
        answer = _messages(response, at)
        if len(answer) != 1 or answer[0]["role"] != "assistant":
            at.fail("the response must be a text, or one message of the assistant", found=_brief(response))
        messages += answer
    else:
        messages.append(_text_message("assistant", response, at))
    return messages


def _descend(cell: Any, path: tuple[str, ...], at: _Place, key: str) -> str | list[Any]:
    """The text, or the list of messages, in `cell`. `path` is followed only where the cell is a struct.

    A list of one is taken for its element where that is a text or holds the first key of the path.
    """
    if cell is None:
        at.fail("the cell is null", expected="a text")
    if isinstance(cell, list) and len(cell) == 1:
        only = cell[0]
        if isinstance(only, str) or (isinstance(only, dict) and path and path[0] in only):
            cell = only
    if isinstance(cell, str | list):
        return cell
    if not isinstance(cell, dict):
        at.fail("the cell is neither text nor a struct", found=_brief(cell))
    if not path:
        at.fail("the cell is a struct", found=f"fields {', '.join(cell)}", fix=f"{key}=[{next(iter(cell), 'field')}]")
    return _follow(cell, path, at, key)


def _follow(cell: dict[str, Any], path: tuple[str, ...], at: _Place, key: str) -> str:
    value: Any = cell
    for depth, name in enumerate(path):
        where = "".join(f"[{part}]" for part in path[:depth])
        if not isinstance(value, dict):
            at.fail(f"{at.column}{where} is not a struct", found=_brief(value), fix=f"shorten {key}")
        if name not in value:
            at.fail(f"{at.column}{where} has no field {name!r} ({key})", found=f"fields {', '.join(value)}")
        value = value[name]
    where = "".join(f"[{part}]" for part in path)
    if not isinstance(value, str):
        at.fail(
            f"{at.column}{where} is not a text", found=_brief(value), fix=f"set {key} to a path that ends in a text"
        )
    return value


def _text_message(role: str, text: str, at: _Place) -> Message:
    _check_value(text, at)
    return {"role": role, "content": text}


def _multi_turn(row: Row, ref: RowRef, data: DataConfig) -> list[Message]:
    at = _Place(ref, data.multiturn.messages_key)
    cell = row[data.multiturn.messages_key]
    messages = _messages(_from_json(cell, at) if isinstance(cell, str) else cell, at)
    if not any(message["role"] == "assistant" for message in messages):
        roles = ", ".join(sorted({message["role"] for message in messages}))
        at.fail("no message of the assistant: nothing to train on", found=f"roles {roles}", expected="assistant")
    return messages


def _tools_and_kwargs(row: Row, ref: RowRef, data: DataConfig) -> tuple[list[dict[str, Any]] | None, dict[str, Any]]:
    tools_key, thinking_key = data.multiturn.tools_key, data.multiturn.enable_thinking_key
    thinking = _truth(row.get(thinking_key), _Place(ref, thinking_key), default=None)
    kwargs = {} if thinking is None else {"enable_thinking": thinking}
    return _tools(row.get(tools_key), _Place(ref, tools_key)), kwargs


def _truth(cell: Any, at: _Place, default: bool | None, fix: str | None = None) -> bool | None:
    if cell is None:
        return default
    if not isinstance(cell, bool):
        at.fail("not a truth value", found=_brief(cell), expected="true, false or null", fix=fix)
    return cell


def _messages(cell: Any, at: _Place) -> list[Message]:
    if cell is None:
        at.fail("the cell is null", expected="a list of messages")
    if not isinstance(cell, list):
        at.fail("the cell is not a list of messages", found=_brief(cell))
    if not cell:
        at.fail("the list of messages is empty")
    return [_message(entry, at.of_message(index)) for index, entry in enumerate(cell)]


def _message(entry: Any, at: _Place) -> Message:
    if not isinstance(entry, dict):
        at.fail("the message is not a struct", found=_brief(entry), expected="{role, content}")
    # Arrow gives every message the keys of all messages, filled with null. Templates test whether a key is there.
    message = {key: value for key, value in entry.items() if value is not None}
    role = message.get("role")
    if not isinstance(role, str) or not role:
        hint = (
            "rename `from`/`value` to `role`/`content`, `human`/`gpt` to `user`/`assistant`"
            if "from" in entry
            else None
        )
        at.fail("the message has no role", found=_brief(entry), expected="a text, for example user", fix=hint)
    if "tool_calls" in message:
        calls = _tool_calls(message.pop("tool_calls"), at)
        if calls:
            message["tool_calls"] = calls
    if "content" not in message:
        if "tool_calls" not in message:
            at.fail(f"the {role} message has no content", found="null" if "content" in entry else "no such key")
        message["content"] = ""
    message["content"] = _content(message["content"], at)
    _truth(message.get("train"), at, default=True)
    _check_value(message, at)
    return message


def _content(content: Any, at: _Place) -> str:
    """Text, or the texts of a list of text parts joined: templates of text models would drop a list silently."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        at.fail("the content is not a text", found=_brief(content))
    return "".join(_part(part, at) for part in content)


def _part(part: Any, at: _Place) -> str:
    text = part.get("text") if isinstance(part, dict) and part.get("type") in ("text", None) else part
    if not isinstance(text, str):
        at.fail("a part of the content is not a text", found=_brief(part), expected='{"type": "text", "text": …}')
    return text


def _tool_calls(calls: Any, at: _Place) -> list[Any]:
    if not isinstance(calls, list):
        at.fail("tool_calls is not a list", found=_brief(calls))
    return [_tool_call(call, at) for call in calls]


def _tool_call(call: Any, at: _Place) -> dict[str, Any]:
    if not isinstance(call, dict):
        at.fail("a tool call is not a struct", found=_brief(call))
    call = _drop_nulls(call)
    inner = call.get("function", call)
    if not isinstance(inner, dict) or not isinstance(inner.get("name"), str):
        at.fail("a tool call has no function name", found=_brief(call))
    arguments = inner.get("arguments", {})
    if isinstance(arguments, str):
        arguments = _from_json(arguments, at) if arguments.strip() else {}
    if not isinstance(arguments, dict):
        at.fail("the arguments of a tool call are not an object", found=_brief(arguments))
    inner = inner | {"arguments": arguments}
    return call | {"function": inner} if "function" in call else inner


def _tools(cell: Any, at: _Place) -> list[dict[str, Any]] | None:
    """The tools in a cell; the same object for the same JSON text, which many rows share."""
    if not isinstance(cell, str):
        return _parsed_tools(cell, at)
    try:
        return _tools_of_text(cell)
    except DataError:
        return _parsed_tools(cell, at)  # the same error, with its place


@lru_cache(KEPT_TOOLS)
def _tools_of_text(text: str) -> list[dict[str, Any]] | None:
    return _parsed_tools(text, _Place(RowRef("", 0), ""))


def _parsed_tools(cell: Any, at: _Place) -> list[dict[str, Any]] | None:
    tools = _from_json(cell, at) if isinstance(cell, str) and cell.strip() else cell
    if not tools:
        return None
    if not isinstance(tools, list):
        at.fail("not a list of tools", found=_brief(tools))
    parsed = [_from_json(tool, at) if isinstance(tool, str) else tool for tool in tools]
    for tool in parsed:
        if not isinstance(tool, dict):
            at.fail("a tool is not an object", found=_brief(tool))
    # A struct column unites the fields of all tools and fills the others with null; JSON text says what it means.
    if not isinstance(tools[0], str) and not isinstance(cell, str):
        parsed = [_drop_nulls(tool) for tool in parsed]
    _check_value(parsed, at)
    return parsed


class Forgeries:
    """Finds text of a row that spells a token matched by `controls`, and would be taken for one."""

    def __init__(self, controls: re.Pattern[str]) -> None:
        self.controls = controls
        self.tools: list[dict[str, Any]] | None = None
        self.in_tools: str | None = None

    def first(self, conversation: Conversation) -> str | None:
        """The first such token and where it is, in words; None where there is none."""
        for index, message in enumerate(conversation.messages):
            found = self._first(message)
            if found is not None:
                return f"message {index} spells {found}"
        if conversation.tools is not self.tools:
            self.tools, self.in_tools = conversation.tools, self._first(conversation.tools)
        return None if self.in_tools is None else f"the tools spell {self.in_tools}"

    def _first(self, value: Any) -> str | None:
        texts: list[str] = []
        _collect_texts(value, texts)
        if not self.controls.search("\n".join(texts)):
            return None
        found = next((match for text in texts if (match := self.controls.search(text))), None)
        return None if found is None else found.group()


def _collect_texts(value: Any, into: list[str]) -> None:
    if isinstance(value, str):
        into.append(value)
    elif isinstance(value, dict):
        into.extend(value)
        for item in value.values():
            _collect_texts(item, into)
    elif isinstance(value, list):
        for item in value:
            _collect_texts(item, into)


def _drop_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        kept = ((key, item) for key, item in value.items() if item is not None)
        return {key: item if type(item) is str else _drop_nulls(item) for key, item in kept}
    return [_drop_nulls(item) for item in value] if isinstance(value, list) else value


def _from_json(text: str, at: _Place) -> Any:
    def refuse(literal: str) -> NoReturn:
        raise ValueError(f"{literal} is not JSON")

    try:
        return json.loads(text, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        at.fail("the text is not valid JSON", found=f"{error}: {_brief(text)}")


def _check_value(value: Any, at: _Place, depth: int = 0) -> None:
    """Only what JSON knows, and only text that can be encoded."""
    if depth > MOST_LEVELS:
        at.fail("a value is nested too deeply", expected=f"at most {MOST_LEVELS} levels")
    if isinstance(value, str):
        if not value.isascii():
            _check_text(value, at)
    elif isinstance(value, dict):
        for item in chain.from_iterable(value.items()):
            if type(item) is not str or not item.isascii():
                _check_value(item, at, depth + 1)
    elif isinstance(value, list):
        for item in value:
            _check_value(item, at, depth + 1)
    elif not isinstance(value, SCALARS):
        at.fail("a value is not text, number, truth value, list or struct", found=_brief(value))


def _check_text(text: str, at: _Place) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        at.fail(f"character {error.start} is a lone surrogate", found=f"U+{code:04X}", expected="valid Unicode")


def _brief(value: Any) -> str:
    shown = repr(value)
    return f"{type(value).__name__} {shown[:117]}…" if len(shown) > 120 else f"{type(value).__name__} {shown}"


class _Place:
    """Where in the data an error is: file, row, column, message."""

    def __init__(self, ref: RowRef, column: str, message: int | None = None) -> None:
        self.ref = ref
        self.column = column
        self.message = message

    def of_message(self, index: int) -> _Place:
        return _Place(self.ref, self.column, index)

    def fail(self, what: str, *, found: object = None, expected: object = None, fix: str | None = None) -> NoReturn:
        message = "" if self.message is None else f", message {self.message}"
        raise DataError(f"{self.ref}, column {self.column}{message}: {what}", found=found, expected=expected, fix=fix)

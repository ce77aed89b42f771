r"""Prove that what is said in a row is in its texts, as a target or as context; name what is not.

A template leaves out what it does not know, without an error: a developer's message, the output of a tool, the tools.
Whether a text of a row is written cannot be told from a search alone: "5" occurs somewhere by chance. So a conversation
of the same shape is rendered with marks in place of its texts, once for each shape, and the marks are looked for. Then
each row is searched for its own texts too, as a template may decide by what is said.

    shape     user, tool, assistant                                   (roles, and the keys of each message)
    marked    user "qjz1zjq", tool "qjz2zjq", assistant "qjz3zjq"
    rendered  …user\nqjz1zjq…assistant\nqjz3zjq…                      the content of message 1 is lost
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from apollo_sft.data.render.message_forms import reasoning_of, split_reasoning
from apollo_sft.data.render.renderings import UnprovableError
from apollo_sft.data.render.replies import is_in, plain_texts
from apollo_sft.data.render.sandbox import RenderError
from apollo_sft.types import REASONING_KEYS, Conversation, Message

MOST_SHAPES = 4096
"""Shapes whose verdict is remembered."""


@dataclass(frozen=True, slots=True)
class Part:
    """Something that is said in a row."""

    message: int | None
    """The number of the message; None for the tools."""

    key: str
    texts: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Lost:
    """Something that is said in a row and is neither trained nor in a prompt."""

    key: str
    """content, reasoning, tool_calls, tools, or the name of a column."""

    messages: tuple[int, ...]
    """The messages that say it; none where it is a column's."""

    reason: str


class Conservation:
    """Finds what is said in rows and is in none of their texts. `texts_of`: the texts of a conversation."""

    def __init__(self, texts_of: Callable[[Conversation], list[str]]) -> None:
        self.texts_of = texts_of
        self._verdicts: dict[Any, frozenset[tuple[int | None, str]]] = {}

    def lost(self, conversation: Conversation, texts: Sequence[str], trained: Collection[int]) -> list[Part]:
        """Return what is said outside of the trained messages and is not in `texts`, the texts of the row."""
        parts = list(parts_of(conversation, trained))
        if not parts:
            return []

        unwritten = self._verdict(conversation)
        found = []
        for part in parts:
            is_written = all(any(is_in(said, text) for text in texts) for said in part.texts)
            if not is_written or (part.message, part.key) in unwritten:
                found.append(part)
        return found

    def _verdict(self, conversation: Conversation) -> frozenset[tuple[int | None, str]]:
        """Return what the template leaves out of conversations of this shape, as (message, key)."""
        shape = _shape(conversation)
        if shape not in self._verdicts:
            if len(self._verdicts) == MOST_SHAPES:
                self._verdicts.clear()
            self._verdicts[shape] = self._unwritten(conversation)
        return self._verdicts[shape]

    def _unwritten(self, conversation: Conversation) -> frozenset[tuple[int | None, str]]:
        marked = _marked(conversation)
        try:
            texts = self.texts_of(marked)
        except (RenderError, UnprovableError):
            # The template does not accept marks there, such as a name that it looks up: only the search is left.
            return frozenset()

        whole = "".join(texts)
        unwritten = set()
        for part in parts_of(marked):
            if not all(text in whole for text in part.texts):
                unwritten.add((part.message, part.key))
        return frozenset(unwritten)


def lost_of(conversation: Conversation, parts: Sequence[Part]) -> list[Lost]:
    """Return what is lost of a row, alike parts together: `parts`, and columns that no key names."""
    found: list[Lost] = []
    said = "neither trained nor in a prompt"
    messages: dict[tuple[str, str], list[int]] = {}
    for part in parts:
        if part.message is None:
            found.append(Lost(part.key, (), f"{said}: the {part.key}, which the template does not write"))
        else:
            role = conversation.messages[part.message]["role"]
            messages.setdefault((part.key, role), []).append(part.message)

    for (key, role), indices in messages.items():
        reason = f"{said}: the {key} of the role {role}, which the template does not write"
        found.append(Lost(key, tuple(indices), reason))
    for name in conversation.unread:
        found.append(Lost(name, (), f"{said}: the column {name}, which no key names"))
    return found


def parts_of(conversation: Conversation, without: Collection[int] = ()) -> Iterator[Part]:
    """Yield what is said in a row: contents, reasoning, calls, tools. `without`: messages that are left out."""
    for index, message in enumerate(conversation.messages):
        if index in without:
            continue
        reasoning, answer = split_reasoning(message["content"])
        contents = [message["content"]]
        if answer is not None:
            contents = [reasoning, answer]
        said = tuple(text for text in contents if text.strip())
        if said:
            yield Part(index, "content", said)

        reasoning = reasoning_of(message)
        if reasoning.strip():
            yield Part(index, "reasoning", (reasoning,))
        if "tool_calls" in message:
            yield Part(index, "tool_calls", tuple(_texts_of_calls(message)))

    names = tuple(_names_of_tools(conversation.tools))
    if names:
        yield Part(None, "tools", names)


def _texts_of_calls(message: Message) -> Iterator[str]:
    for call in message["tool_calls"]:
        function = call.get("function", call)
        yield function["name"]
        yield from plain_texts(function.get("arguments"))


def _names_of_tools(tools: list[dict[str, Any]] | None) -> Iterator[str]:
    for tool in tools or ():
        function = tool.get("function", tool)
        if isinstance(function, dict) and isinstance(function.get("name"), str):
            yield function["name"]


def _shape(conversation: Conversation) -> Any:
    """Return what a rendering may depend on besides the texts."""
    messages = []
    for message in conversation.messages:
        _, answer = split_reasoning(message["content"])
        content = (bool(message["content"].strip()), answer is not None)
        messages.append((message["role"], content, len(message.get("tool_calls", ())), frozenset(message)))
    tools = len(tuple(_names_of_tools(conversation.tools)))
    return (
        tuple(messages),
        tools,
        repr(conversation.template_kwargs),
        conversation.untrained,
        tuple(conversation.thinking.items()),
    )


def _marked(conversation: Conversation) -> Conversation:
    """Return the conversation with a mark of its own in place of each text.

    A mark is a plain word: templates write names and arguments in forms that escape other characters.
    """
    number = 0

    def mark() -> str:
        nonlocal number
        number += 1
        return f"qjz{number}zjq"

    messages = [_marked_message(message, mark) for message in conversation.messages]
    tools = conversation.tools
    if tools is not None:
        tools = [_marked_tool(tool, mark) for tool in tools]
    return replace(conversation, messages=messages, tools=tools)


def _marked_message(message: Message, mark: Callable[[], str]) -> Message:
    marked = dict(message)
    _, answer = split_reasoning(message["content"])
    if answer is not None:
        marked["content"] = f"<think>\n{mark()}\n</think>\n\n{mark()}"
    elif message["content"].strip():
        marked["content"] = mark()

    if reasoning_of(message):
        reasoning = mark()
        marked |= {key: reasoning for key in REASONING_KEYS if message.get(key)}
    if "tool_calls" in message:
        marked["tool_calls"] = [_marked_call(call, mark) for call in message["tool_calls"]]
    return marked


def _marked_call(call: dict[str, Any], mark: Callable[[], str]) -> dict[str, Any]:
    marked = {"name": mark(), "arguments": {"a": mark()}}
    if "function" in call:
        return call | {"function": call["function"] | marked}
    return call | marked


def _marked_tool(tool: dict[str, Any], mark: Callable[[], str]) -> dict[str, Any]:
    if isinstance(tool.get("function"), dict):
        return tool | {"function": tool["function"] | {"name": mark()}}
    return tool | {"name": mark()}

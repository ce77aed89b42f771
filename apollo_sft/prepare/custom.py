"""Prepare a user's own data: columns of any name, and the usual formats, which are recognised by their columns.

Conversations (OpenAI, ShareGPT) become the columns `messages` and `tools`; prompts and responses (Alpaca, or columns by
name) become questions and answers, or conversations where there is a system prompt or a history.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from apollo_sft.data.read.files import Row
from apollo_sft.data.read.messages import MEDIA
from apollo_sft.errors import ConfigError, DataError
from apollo_sft.prepare.answers import final_answer
from apollo_sft.prepare.chat_shapes import messages_of, tools_of, without_nulls
from apollo_sft.prepare.columns import ANSWER, QUESTION, Finder, as_text, at_path
from apollo_sft.prepare.preparation import Task
from apollo_sft.prepare.records import CHAT_SCHEMA, QUESTION_SCHEMA, Instruction, Origin, chat_row, question_row
from apollo_sft.prepare.rejection import RejectedRow
from apollo_sft.types import Message

DATA_SOURCE = "custom"

BESIDE = ("train", "enable_thinking", "chat_template_kwargs", *MEDIA)
"""Columns beside the messages that are written, or refused."""


@dataclass(frozen=True, slots=True)
class Layout:
    """The columns of the data; None where there is no such column. `column.field` is a field of a struct.

    With neither `messages` nor `prompt`, the columns are searched row by row.
    """

    name: str
    """The format in words."""

    messages: str | None = None
    prompt: str | None = None
    context: str | None = None
    response: str | None = None
    system: str | None = None
    history: str | None = None
    tools: str | None = None
    ground_truth: str | None = None

    @property
    def is_chat(self) -> bool:
        """Return whether rows become conversations."""
        return bool(self.messages or self.system or self.history)

    def columns(self) -> list[str]:
        """List the columns that are read."""
        named = (self.messages, self.prompt, self.context, self.response, self.system, self.history, self.tools)
        return [column for column in (*named, self.ground_truth) if column]

    def describe(self) -> str:
        """Return a line about the format and its columns."""
        named = {"messages": self.messages, "prompt": self.prompt, "input": self.context, "response": self.response}
        named |= {"system": self.system, "history": self.history, "tools": self.tools, "truth": self.ground_truth}
        columns = ", ".join(f"{what} = {column}" for what, column in named.items() if column)
        if not columns:
            return f"recognised: {self.name}"
        return f"recognised: {self.name} ({columns})"


def recognise(names: Sequence[str], first: Row, given: Layout) -> Layout:
    """Return the layout of a file with the columns `names`. Columns that are `given` by name come first.

    Raises: ConfigError for a prompt without a response; DataError for a column that is not there.
    """
    for column in (given.messages, given.prompt, given.response, given.system, given.tools, given.ground_truth):
        if column is not None and column.partition(".")[0] not in names:
            raise DataError(f"there is no column {column!r}", found=f"columns {', '.join(names) or '(none)'}")

    if (given.prompt is None) != (given.response is None):
        raise ConfigError("--prompt_column and --response_column belong together", found="one of them")

    def existing(name: str) -> str | None:
        if name in names:
            return name
        return None

    if given.prompt is not None and given.messages is None:
        return replace(given, name="prompt and response by name")

    # Conversations first: files with them often have columns of single questions too.
    chat = given.messages or existing("messages") or existing("conversations")
    if chat is not None:
        shape = "OpenAI messages"
        system = given.system
        if _is_sharegpt(first.get(chat)):
            shape = "ShareGPT conversations"
            system = given.system or existing("system")
        return replace(given, name=shape, messages=chat, system=system, tools=given.tools or existing("tools"))
    if {"instruction", "output"} <= set(names):
        found = replace(given, name="Alpaca", prompt="instruction", context=existing("input"), response="output")
        return replace(found, system=given.system or existing("system"), history=existing("history"))

    return replace(given, name="question and answer")


def task(data_source: str, instruction: str | None, layout: Layout) -> Task:
    """Return the task. `instruction`: the end of every question; None for nothing. Conversations are not changed."""
    finder = Finder(keep_instructions=True)
    suffix = Instruction(instruction or "", separator="\n")

    left_out: Counter[str] = Counter()
    used = {column.partition(".")[0] for column in layout.columns()}

    def convert_chat(row: Row, origin: Origin) -> Row:
        if any(row.get(medium) for medium in MEDIA):
            raise RejectedRow("images, videos or sound")
        messages = _messages(row, origin)
        system = _text_at(row, layout.system)
        if system and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": system}, *messages]

        tools = None
        if layout.tools:
            tools = tools_of(at_path(row, layout.tools), origin.is_json)
        left_out.update(name for name in _unused(row) if name not in BESIDE)
        made = chat_row(origin, messages, tools, _truth(row, layout, messages[-1].get("content") or ""))
        return made | _beside(row)

    def _messages(row: Row, origin: Origin) -> list[Message]:
        if layout.messages:
            return messages_of(at_path(row, layout.messages), origin.is_json, left_out)
        question = _question(row, layout, finder)
        answer = _answer(row, layout, finder)
        user = {"role": "user", "content": suffix.prompt(question)}
        return [*_history(row, layout), user, {"role": "assistant", "content": answer}]

    def _unused(row: Row) -> list[str]:
        return [name for name, value in row.items() if name not in used and value is not None]

    def convert_pair(row: Row, origin: Origin) -> Row:
        if layout.prompt:
            left_out.update(_unused(row))
        question = _question(row, layout, finder)
        answer = _answer(row, layout, finder)
        return question_row(origin, suffix.prompt(question), question, answer, _truth(row, layout, answer))

    # A system prompt or a history does not fit into a question: then pairs become conversations.
    if layout.is_chat:
        return Task("custom", data_source, CHAT_SCHEMA, convert_chat, {}, finder.describe, suffix.text, left_out)

    needed: dict[str, tuple[str, ...]] = {}
    if not layout.prompt:
        needed = {"question": QUESTION, "answer": ANSWER}
    return Task("custom", data_source, QUESTION_SCHEMA, convert_pair, needed, finder.describe, suffix.text, left_out)


def _beside(row: Row) -> Row:
    """Return the columns beside the messages that a training reads. Raises: RejectedRow."""
    found: Row = {}
    for name in ("train", "enable_thinking"):
        value = row.get(name)
        if value is not None and value not in (0, 1):
            raise RejectedRow(f"{name} is neither true nor false")
        if value is not None:
            found[name] = bool(value)

    kwargs = row.get("chat_template_kwargs")
    if isinstance(kwargs, dict):
        kwargs = json.dumps(without_nulls(kwargs), ensure_ascii=False)
    if kwargs:
        found["chat_template_kwargs"] = kwargs
    return found


def _text_at(row: Row, path: str | None) -> str:
    """Return the text at a path; empty without one."""
    if not path:
        return ""
    value = at_path(row, path)
    if isinstance(value, str):
        return value
    return as_text(value)


def _question(row: Row, layout: Layout, finder: Finder) -> str:
    """Return the question of a row, with its context. Raises: RejectedRow when there is none."""
    if layout.prompt is None:
        return finder.question(row)

    text = _text_at(row, layout.prompt)
    context = _text_at(row, layout.context)
    if not text.strip():
        raise RejectedRow(f"column {layout.prompt} is empty")
    if not context.strip():
        return text
    return f"{text}\n\n{context}"


def _answer(row: Row, layout: Layout, finder: Finder) -> str:
    """Return the answer of a row. Raises: RejectedRow when there is none."""
    if layout.response is None:
        return finder.answer(row)
    text = _text_at(row, layout.response)
    if not text.strip():
        raise RejectedRow(f"column {layout.response} is empty")
    return text


def _history(row: Row, layout: Layout) -> list[Message]:
    """Return Alpaca's earlier turns: pairs of a question and its answer."""
    if not layout.history:
        return []

    turns: list[Message] = []
    for pair in at_path(row, layout.history) or []:
        texts: list[str] = []
        if isinstance(pair, list):
            texts = [as_text(text) for text in pair]
        if len(texts) != 2 or not all(texts):
            raise RejectedRow("the history is no list of question and answer pairs")
        turns += [{"role": "user", "content": texts[0]}, {"role": "assistant", "content": texts[1]}]

    return turns


def _truth(row: Row, layout: Layout, answer: str) -> str | None:
    """Return the text of the column of truths, else a final answer marked in the answer; None without either."""
    if layout.ground_truth is not None:
        return as_text(at_path(row, layout.ground_truth)) or None
    try:
        return final_answer(answer)
    except RejectedRow:  # an open box is an error in a solution to a math problem, but not in any other text
        return None


def _is_sharegpt(chat: Any) -> bool:
    return isinstance(chat, list) and bool(chat) and isinstance(chat[0], dict) and "from" in chat[0]

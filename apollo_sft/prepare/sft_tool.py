"""Prepare conversations with tools: reasoning and calls by the assistant, outputs by the tool, which are not trained.

Rows that hold real tool messages keep them; a solution with ```python and ```output fences is split.
"""

from __future__ import annotations

from apollo_sft.data.read.files import Row
from apollo_sft.prepare.chat_shapes import messages_of, tools_of
from apollo_sft.prepare.columns import ANSWER, QUESTION, as_text, at_path
from apollo_sft.prepare.informal_math import BoxedProblems
from apollo_sft.prepare.preparation import Task
from apollo_sft.prepare.records import CHAT_SCHEMA, Origin, chat_row
from apollo_sft.prepare.rejection import RejectedRow
from apollo_sft.prepare.tool_text import TOOLS, runs_code, turns

DATA_SOURCE = "AI-MO/NuminaMath-TIR"
CHATS = ("messages", "conversations")
TOOL_ROLES = ("tool", "function", "observation", "function_call", "function_response")


def task(data_source: str, instruction: str | None, code_as: str) -> Task:
    """Return the task. `instruction`: the end of the questions of text rows, as in informal-math.

    `code_as`: `calls` for calls of a tool `python`, with the column `tools`; `text` for fences in the assistant's text.
    """
    problems = BoxedProblems(instruction)

    def convert(row: Row, origin: Origin) -> Row:
        # Real tool messages are better than a text that is split: they are kept.
        chat = next((row[name] for name in CHATS if _has_tools(row.get(name))), None)
        if chat is not None:
            return chat_row(origin, messages_of(chat), tools_of(row.get("tools")), None)
        if not any(runs_code(text) for text in _solutions(row)):
            raise RejectedRow("no tool is called")

        question, answer, truth = problems.read(row)
        user = {"role": "user", "content": problems.suffix.prompt(question)}
        messages = [user, *turns(answer, code_as == "calls")]
        tools = None
        if code_as == "calls":
            tools = TOOLS
        return chat_row(origin, messages, tools, truth)

    needed = {"question": (*QUESTION, *CHATS), "answer": (*ANSWER, *CHATS)}
    return Task("sft-tool", data_source, CHAT_SCHEMA, convert, needed, problems.describe, problems.suffix.text)


def _solutions(row: Row) -> list[str]:
    """Return every text that may be the solution; of a conversation, the turns."""
    cells = [at_path(row, path) for path in ANSWER]
    texts = list(cells)
    for cell in cells:
        if isinstance(cell, list):
            texts += [turn.get("content") for turn in cell if isinstance(turn, dict)]
    return [as_text(text) for text in texts]


def _has_tools(chat: object) -> bool:
    """Return whether a cell is a conversation with a call or an output of a tool."""
    if isinstance(chat, str):
        return '"tool_calls"' in chat or any(f'"{role}"' in chat for role in TOOL_ROLES)
    if not isinstance(chat, list):
        return False

    turns = [turn for turn in chat if isinstance(turn, dict)]
    return any(
        turn.get("tool_calls") or turn.get("function_call") or turn.get("role", turn.get("from")) in TOOL_ROLES
        for turn in turns
    )

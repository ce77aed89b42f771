"""Convert solutions with code and its outputs, in fences, to conversations with a tool.

Source: the format of NuminaMath-TIR and ToRA (Gou et al., 2024): reasoning, ```python, ```output, reasoning, …
"""

from __future__ import annotations

import json
import re
from typing import Any, Literal

from apollo_sft.prepare.rejection import RejectedRow
from apollo_sft.types import Message

FENCE = re.compile(r"[ \t]*```[ \t]*(\w*)[ \t]*")
CODE = ("python", "py", "python3")
OUTPUT = ("output",)
TOOL = "python"
TOOLS = json.dumps(
    [
        {
            "type": "function",
            "function": {
                "name": TOOL,
                "description": "Runs Python code and returns what it prints.",
                "parameters": {
                    "type": "object",
                    "properties": {"code": {"type": "string", "description": "The code to run."}},
                    "required": ["code"],
                },
            },
        }
    ]
)
"""The one tool that such solutions call, for the column `tools`."""

Part = tuple[Literal["text", "code", "output"], str]


def runs_code(text: str) -> bool:
    """Return whether `text` holds a fence of Python code or of an output."""
    opened = (FENCE.fullmatch(line) for line in text.splitlines())
    return any(match is not None and match[1].lower() in (*CODE, *OUTPUT) for match in opened)


def turns(text: str, as_calls: bool) -> list[Message]:
    """Return the turns that answer the user: reasoning and code by the assistant, outputs of the code by the tool.

    `as_calls`: code as a call of the tool `python`; otherwise as a fence in the assistant's text.
    Raises: RejectedRow for fences that are not closed, code without its output or the reverse, no code at all, or
    nothing after the last output.
    """
    messages: list[Message] = []
    reasoning = ""
    waits = False
    # Code waits for its output, reasoning for the code or the end that it belongs to.
    for kind, part in parts(text):
        if kind == "output":
            if not waits:
                raise RejectedRow("an output without code before it")
            message: Message = {"role": "tool", "content": part}
            if as_calls:
                message |= {"tool_call_id": _call_id(messages), "name": TOOL}
            messages.append(message)
        elif waits:
            raise RejectedRow("code without its output")
        elif kind == "code" and as_calls:
            messages.append(_code_turn(reasoning, part, len(messages)))
        elif kind == "code":
            messages.append(_fenced_turn(reasoning, part))
        waits = kind == "code"
        reasoning = ""
        if kind == "text":
            reasoning = part

    if waits:
        raise RejectedRow("code without its output")
    if not messages:
        raise RejectedRow("no tool is called")
    if not reasoning:
        raise RejectedRow("there is no text after the last output")
    return [*messages, {"role": "assistant", "content": reasoning}]


def parts(text: str) -> list[Part]:
    """Return text, code and outputs in order, stripped, without empty text. Fences of other languages stay in the text.

    Raises: RejectedRow for a fence that is not closed.
    """
    found: list[Part] = []
    lines: list[str] = []
    language: str | None = None
    for line in text.splitlines():
        fence = FENCE.fullmatch(line)
        if fence is None:
            lines.append(line)
        elif language is None:
            language = fence[1].lower()
            lines = _opened(found, lines, line, language)
        elif fence[1]:  # a fence with a language opens: the one before was never closed
            raise RejectedRow("a code fence is not closed")
        else:
            lines = _closed(found, lines, line, language)
            language = None

    if language is not None:
        raise RejectedRow("a code fence is not closed")

    _add_text(found, lines)
    return found


def _opened(found: list[Part], lines: list[str], line: str, language: str) -> list[str]:
    """Return the lines to collect further, after a fence was opened."""
    if language not in (*CODE, *OUTPUT):
        return [*lines, line]
    _add_text(found, lines)
    return []


def _closed(found: list[Part], lines: list[str], line: str, language: str) -> list[str]:
    """Return the lines to collect further, after a fence was closed. Raises: RejectedRow."""
    if language not in (*CODE, *OUTPUT):
        return [*lines, line]

    inside = "\n".join(lines)
    if language in CODE and not inside.strip():
        raise RejectedRow("a code fence is empty")
    if language in OUTPUT:
        found.append(("output", inside.strip()))
    else:
        found.append(("code", inside.strip("\n")))

    return []


def _add_text(found: list[Part], lines: list[str]) -> None:
    text = "\n".join(lines).strip()
    if text:
        found.append(("text", text))


def _code_turn(reasoning: str, code: str, number: int) -> Message:
    function = {"name": TOOL, "arguments": json.dumps({"code": code}, ensure_ascii=False)}
    call: dict[str, Any] = {"id": f"python{number:03d}", "type": "function", "function": function}
    return {"role": "assistant", "content": reasoning or None, "tool_calls": [call]}


def _call_id(messages: list[Message]) -> str:
    """Return the id of the last call: nine letters and digits, as Mistral's templates require."""
    identity: str = messages[-1]["tool_calls"][0]["id"]
    return identity


def _fenced_turn(reasoning: str, code: str) -> Message:
    return {"role": "assistant", "content": f"{reasoning}\n```python\n{code}\n```".lstrip("\n")}

"""Solutions that hold code and what it printed, in fences, as conversations with a tool.

Source: the form of NuminaMath-TIR and ToRA (Gou et al., 2024): reasoning, ```python, ```output, reasoning, …
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
    """Whether `text` holds a fence of Python code or of an output."""
    opened = (FENCE.fullmatch(line) for line in text.splitlines())
    return any(match is not None and match[1].lower() in (*CODE, *OUTPUT) for match in opened)


def turns(text: str, as_calls: bool) -> list[Message]:
    """The turns that answer the user: reasoning and code by the assistant, what the code printed by the tool.

    `as_calls`: code as a call of the tool `python`; otherwise as a fence in the assistant's text.
    Raises: RejectedRow for fences that are not closed, code without its output or the reverse, no code at all, or
    nothing after the last output.
    """
    messages: list[Message] = []
    said = ""
    waits = False
    for kind, part in parts(text):
        if kind == "output":
            if not waits:
                raise RejectedRow("an output without code before it")
            call = {"tool_call_id": _call_id(messages), "name": TOOL} if as_calls else {}
            messages.append({"role": "tool", "content": part, **call})
        elif waits:
            raise RejectedRow("code without its output")
        elif kind == "code":
            messages.append(_code_turn(said, part, len(messages)) if as_calls else _fenced_turn(said, part))
        waits = kind == "code"
        said = part if kind == "text" else ""
    if waits:
        raise RejectedRow("code without its output")
    if not messages:
        raise RejectedRow("no tool is called")
    if not said:
        raise RejectedRow("nothing is said after the last output")
    return [*messages, {"role": "assistant", "content": said}]


def parts(text: str) -> list[Part]:
    """Text, code and outputs in order, stripped; empty text is left out. Fences of other languages stay in the text.

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
        elif fence[1]:
            raise RejectedRow("a code fence is not closed")
        else:
            lines = _closed(found, lines, line, language)
            language = None
    if language is not None:
        raise RejectedRow("a code fence is not closed")
    _add_text(found, lines)
    return found


def _opened(found: list[Part], lines: list[str], line: str, language: str) -> list[str]:
    """The lines collected so far, after a fence was opened."""
    if language not in (*CODE, *OUTPUT):
        return [*lines, line]
    _add_text(found, lines)
    return []


def _closed(found: list[Part], lines: list[str], line: str, language: str) -> list[str]:
    if language not in (*CODE, *OUTPUT):
        return [*lines, line]
    inside = "\n".join(lines)
    if language in CODE and not inside.strip():
        raise RejectedRow("a code fence is empty")
    found.append(("output", inside.strip()) if language in OUTPUT else ("code", inside.strip("\n")))
    return []


def _add_text(found: list[Part], lines: list[str]) -> None:
    text = "\n".join(lines).strip()
    if text:
        found.append(("text", text))


def _code_turn(said: str, code: str, number: int) -> Message:
    function = {"name": TOOL, "arguments": json.dumps({"code": code}, ensure_ascii=False)}
    call: dict[str, Any] = {"id": f"python{number:03d}", "type": "function", "function": function}
    return {"role": "assistant", "content": said or None, "tool_calls": [call]}


def _call_id(messages: list[Message]) -> str:
    """Nine letters and digits: what Mistral's templates want."""
    identity: str = messages[-1]["tool_calls"][0]["id"]
    return identity


def _fenced_turn(said: str, code: str) -> Message:
    return {"role": "assistant", "content": f"{said}\n```python\n{code}\n```".lstrip("\n")}

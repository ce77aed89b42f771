"""Find the columns of foreign data that hold the question, the worked answer and the final answer.

The first non-empty one of a fixed list is taken, row by row; how often each was taken is shown.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

from apollo_sft.data.read.files import Row
from apollo_sft.prepare.answers import final_answer
from apollo_sft.prepare.records import KNOWN_INSTRUCTIONS, without_instruction
from apollo_sft.prepare.rejection import RejectedRow

QUESTION = ("question", "problem", "prompt", "Problem", "instruction", "extra_info.question", "messages")
WORKED = ("solution", "detailed_solution", "rationale", "chain_of_thought", "cot")
ANSWER = (*WORKED, "answer", "response", "output", "extra_info.answer", "messages")
TRUTH = (
    *("answer", "solution", "ground_truth", "final_answer", "target", "boxed_answer"),
    *("reward_model.ground_truth", "extra_info.ground_truth", "response", "extra_info.answer", "messages"),
)
ONLY_WORKED = {*WORKED, "response", "output", "extra_info.answer", "messages"}
"""Columns whose text is never a final answer as a whole: the answer must be marked in it."""


class Finder:
    """Finds the texts of a row, and counts in which columns: `taken["question"]["problem"]` is a number of rows."""

    def __init__(self, keep_instructions: bool = False) -> None:
        self.keep_instructions = keep_instructions
        self.taken: dict[str, Counter[str]] = {"question": Counter(), "answer": Counter(), "final answer": Counter()}
        self.also: dict[str, Counter[str]] = {"question": Counter(), "answer": Counter(), "final answer": Counter()}

    def question(self, row: Row) -> str:
        """Return the question without the instruction of an earlier preparation. Raises: RejectedRow without one."""
        texts = _texts(row, QUESTION, "user")
        if not self.keep_instructions:
            texts = [(path, without_instruction(text)) for path, text in texts]

        texts = [(path, text) for path, text in texts if text]
        if not texts:
            raise RejectedRow("no question")
        return self._take("question", texts)

    def answer(self, row: Row) -> str:
        """Return the worked answer, which SFT trains. Raises: RejectedRow when there is none."""
        found = _texts(row, ANSWER, "assistant")
        if not found:
            raise RejectedRow("no answer")
        return self._take("answer", found)

    def truth(self, row: Row) -> str | None:
        """Return the final answer: the one marked in the first text with a mark, or a text of one line as it is."""
        for path, text in _texts(row, TRUTH, "assistant"):
            marked = final_answer(text)
            # A short text without a mark may be the answer itself; a worked solution never is.
            if marked is None and path not in ONLY_WORKED and "\n" not in text:
                marked = text
            if marked is not None:
                self.taken["final answer"][path] += 1
                return marked

        return None

    def _take(self, what: str, texts: list[tuple[str, str]]) -> str:
        path, text = texts[0]
        self.taken[what][path] += 1
        self.also[what].update(other for other, same in texts[1:] if same != text)
        return text

    def describe(self) -> list[str]:
        """Return lines for the screen, for example `question: column problem (12 rows)`."""
        lines = []
        for what, taken in self.taken.items():
            if not taken:
                continue
            columns = ", ".join(f"{path} ({count:,} rows)" for path, count in taken.most_common())
            line = f"{what}: column {columns}"
            if self.also[what]:
                line += f"; also there, not used: {', '.join(self.also[what])}"
            lines.append(line)

        return lines


def has_any(names: list[str], paths: tuple[str, ...]) -> bool:
    """Return whether one of the columns `names` is the column of a path."""
    return any(path.partition(".")[0] in names for path in paths)


def at_path(row: Row, path: str) -> Any:
    """Return the value at `column.field.field`; None where there is none."""
    value: Any = row
    for name in path.split("."):
        if not isinstance(value, dict):
            return None
        value = value.get(name)
    return value


def as_text(value: Any) -> str:
    """Return a cell as text, stripped: the elements of a list one a line, a struct as JSON. Empty for None."""
    if value is None:
        return ""
    if isinstance(value, str):
        return value.strip()
    if isinstance(value, list):
        return "\n".join(filter(None, map(as_text, value)))
    if isinstance(value, dict | bool):
        return json.dumps(value, ensure_ascii=False)
    return str(value)


def _texts(row: Row, paths: tuple[str, ...], role: str) -> list[tuple[str, str]]:
    """Return the non-empty texts at `paths`, in this order, with their paths."""
    found = []
    for path in paths:
        value = at_path(row, path)
        read: Callable[[Any], str] = as_text
        if _is_chat(value):
            read = partial(_only_message, role=role)
        text = read(value)
        if text:
            found.append((path, text))

    return found


def _is_chat(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, dict) and "role" in item for item in value)


def _only_message(messages: list[dict[str, Any]], role: str) -> str:
    """Return the text of the only message of `role`; empty when there is none.

    Raises: RejectedRow for a conversation: several turns, or a system message that a question cannot hold.
    """
    kept = [m for m in messages if not (m["role"] == "system" and as_text(m.get("content")) in KNOWN_INSTRUCTIONS)]
    roles = [message["role"] for message in kept]
    if roles not in (["user"], ["user", "assistant"], ["assistant"]):
        raise RejectedRow("a conversation, not one question and answer: `apollo-sft prepare custom` keeps all of it")
    return next((as_text(message.get("content")) for message in kept if message["role"] == role), "")

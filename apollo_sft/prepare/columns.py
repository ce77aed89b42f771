"""Which columns of foreign data hold the question, the worked answer and the final answer.

The first non-empty one of a fixed list is taken, row by row, and what was taken is counted to be shown.
"""

from __future__ import annotations

import json
from collections import Counter
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
"""Columns whose text is never itself a final answer: one has to be marked in it."""


class Finder:
    """Finds the texts of a row, and counts in which columns: `taken["question"]["problem"]` is a number of rows."""

    def __init__(self, keep_instructions: bool = False) -> None:
        self.keep_instructions = keep_instructions
        self.taken: dict[str, Counter[str]] = {"question": Counter(), "answer": Counter(), "final answer": Counter()}
        self.also: dict[str, Counter[str]] = {"question": Counter(), "answer": Counter(), "final answer": Counter()}

    def question(self, row: Row) -> str:
        """The question without an instruction of an earlier preparation. Raises: RejectedRow when there is none."""
        found = _texts(row, QUESTION, "user")
        texts = found if self.keep_instructions else [(path, without_instruction(text)) for path, text in found]
        texts = [(path, text) for path, text in texts if text]
        if not texts:
            raise RejectedRow("no question")
        return self._take("question", texts)

    def answer(self, row: Row) -> str:
        """The worked answer, which SFT trains. Raises: RejectedRow when there is none."""
        found = _texts(row, ANSWER, "assistant")
        if not found:
            raise RejectedRow("no answer")
        return self._take("answer", found)

    def truth(self, row: Row) -> str | None:
        """The final answer: marked in the first text that marks one, or a text of one line as it stands."""
        for path, text in _texts(row, TRUTH, "assistant"):
            marked = final_answer(text)
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
        """Lines for the screen, for example `question: column problem (12 rows)`."""
        lines = []
        for what, taken in self.taken.items():
            if taken:
                columns = ", ".join(f"{path} ({count:,} rows)" for path, count in taken.most_common())
                others = ", ".join(self.also[what])
                lines.append(f"{what}: column {columns}" + (f"; also there, not used: {others}" if others else ""))
        return lines


def has_any(names: list[str], paths: tuple[str, ...]) -> bool:
    """Whether one of the columns `names` can hold what `paths` name."""
    return any(path.partition(".")[0] in names for path in paths)


def at_path(row: Row, path: str) -> Any:
    """The value at `column.field.field`; None where there is none."""
    value: Any = row
    for name in path.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    return value


def as_text(value: Any) -> str:
    """A cell as text, stripped: the elements of a list one a line, a struct as JSON. Empty for None."""
    if value is None:
        return ""
    if isinstance(value, str):
        return value.strip()
    if isinstance(value, list):
        return "\n".join(text for item in value if (text := as_text(item)))
    return json.dumps(value, ensure_ascii=False) if isinstance(value, dict | bool) else str(value)


def _texts(row: Row, paths: tuple[str, ...], role: str) -> list[tuple[str, str]]:
    """The non-empty texts at `paths`, in this order."""
    found = []
    for path in paths:
        value = at_path(row, path)
        text = _only_message(value, role) if _is_chat(value) else as_text(value)
        if text:
            found.append((path, text))
    return found


def _is_chat(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, dict) and "role" in item for item in value)


def _only_message(messages: list[dict[str, Any]], role: str) -> str:
    """The text of the one message of `role`; empty when there is none.

    Raises: RejectedRow for a conversation: several turns, or a system message that a question cannot hold.
    """
    kept = [m for m in messages if not (m["role"] == "system" and as_text(m.get("content")) in KNOWN_INSTRUCTIONS)]
    roles = [message["role"] for message in kept]
    if roles not in (["user"], ["user", "assistant"], ["assistant"]):
        raise RejectedRow("a conversation, not one question and answer: `apollo-sft prepare custom` keeps it whole")
    return next((as_text(message.get("content")) for message in kept if message["role"] == role), "")

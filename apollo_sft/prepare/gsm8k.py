"""GSM8K: grade-school problems whose answers end in `#### result`.

Source: Cobbe et al., "Training Verifiers to Solve Math Word Problems", 2021; columns as verl prepares them.
"""

from __future__ import annotations

from apollo_sft.data.read.files import Row
from apollo_sft.prepare.answers import marked
from apollo_sft.prepare.columns import ANSWER, QUESTION, Finder
from apollo_sft.prepare.preparation import Task
from apollo_sft.prepare.records import (
    GSM8K_INSTRUCTION,
    QUESTION_SCHEMA,
    Instruction,
    Origin,
    question_row,
)
from apollo_sft.prepare.rejection import RejectedRow

DATA_SOURCE = "openai/gsm8k"
SUBSET = "main"


def task(data_source: str, instruction: str | None) -> Task:
    """Return the task. `instruction`: the end of every question; None for GSM8K's own."""
    finder = Finder()
    if instruction is None:
        instruction = GSM8K_INSTRUCTION

    suffix = Instruction(instruction, separator=" ")

    def convert(row: Row, origin: Origin) -> Row:
        question = finder.question(row)
        answer = finder.answer(row)
        truth = marked(answer)
        if truth is None:
            raise RejectedRow("the answer has no `#### result`")
        return question_row(origin, suffix.prompt(question), question, answer, truth)

    needed = {"question": QUESTION, "answer": ANSWER}
    return Task("gsm8k", data_source, QUESTION_SCHEMA, convert, needed, finder.describe, suffix.text)

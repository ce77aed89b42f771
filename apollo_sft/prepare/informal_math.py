"""Prepare math problems with a worked solution whose final answer is in `\\boxed{}`: MATH and sets like it."""

from __future__ import annotations

from apollo_sft.data.read.files import Row
from apollo_sft.model.final_answers import MARKER
from apollo_sft.prepare.answers import last_boxed, marked
from apollo_sft.prepare.columns import ANSWER, QUESTION, Finder
from apollo_sft.prepare.preparation import Task
from apollo_sft.prepare.records import BOXED_INSTRUCTION, QUESTION_SCHEMA, Instruction, Origin, question_row
from apollo_sft.prepare.rejection import RejectedRow

DATA_SOURCE = "DigitalLearningGmbH/MATH-lighteval"


class BoxedProblems:
    """Reads question, worked answer and final answer of a row.

    `completed`: the number of answers that got a box with the final answer of another column.
    """

    def __init__(self, instruction: str | None) -> None:
        self.finder = Finder()
        if instruction is None:
            instruction = BOXED_INSTRUCTION
        self.suffix = Instruction(instruction, separator="\n")
        self.completed = 0

    def read(self, row: Row) -> tuple[str, str, str]:
        """Return question, worked answer and final answer. Raises: RejectedRow when one of them is missing."""
        question = self.finder.question(row)
        answer = self.finder.answer(row)
        truth = self.finder.truth(row)
        if truth is None:
            raise RejectedRow("no final answer: no \\boxed{}, no `####`, and no column that holds one")
        return question, self._in_a_box(answer, truth), truth

    def describe(self) -> list[str]:
        """Return lines about the columns, and about answers that got a box."""
        lines = self.finder.describe()
        if self.completed:
            lines.append(
                f"{self.completed:,} answers had no \\boxed{{}}: the final answer was put into one, as the prompt asks"
            )
        return lines

    def _in_a_box(self, answer: str, truth: str) -> str:
        """Return the answer in the form of the prompt: `#### 7` becomes `\\boxed{7}`; one without either gets a box."""
        if "\\boxed" not in self.suffix.text or last_boxed(answer) is not None:
            return answer

        self.completed += 1
        found = marked(answer)
        if found is not None:
            return f"{answer.rpartition(MARKER)[0].rstrip()}\n\\boxed{{{found}}}".lstrip()
        if answer == truth:
            return f"\\boxed{{{truth}}}"
        return f"{answer}\n\\boxed{{{truth}}}"


def task(data_source: str, instruction: str | None) -> Task:
    """Return the task. `instruction`: the end of every question; None for the one that requests a `\\boxed{}`."""
    problems = BoxedProblems(instruction)

    def convert(row: Row, origin: Origin) -> Row:
        question, answer, truth = problems.read(row)
        return question_row(origin, problems.suffix.prompt(question), question, answer, truth)

    needed = {"question": QUESTION, "answer": ANSWER}
    return Task("informal-math", data_source, QUESTION_SCHEMA, convert, needed, problems.describe, problems.suffix.text)

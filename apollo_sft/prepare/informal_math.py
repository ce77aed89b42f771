"""Problems in words with a worked solution whose final answer stands in `\\boxed{}`: MATH and sets like it."""

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
    """Question, worked answer and final answer of a row. `completed`: answers that got a box from another column."""

    def __init__(self, instruction: str | None) -> None:
        self.finder = Finder()
        self.suffix = Instruction(BOXED_INSTRUCTION if instruction is None else instruction, separator="\n")
        self.completed = 0

    def read(self, row: Row) -> tuple[str, str, str]:
        """Raises: RejectedRow when one of the three is missing."""
        question, answer = self.finder.question(row), self.finder.answer(row)
        truth = self.finder.truth(row)
        if truth is None:
            raise RejectedRow("no final answer: no \\boxed{}, no `####`, and no column that holds one")
        return question, self._in_a_box(answer, truth), truth

    def describe(self) -> list[str]:
        note = f"{self.completed:,} answers had no \\boxed{{}}: the final answer was put into one, as the prompt asks"
        return [*self.finder.describe(), *([note] if self.completed else [])]

    def _in_a_box(self, answer: str, truth: str) -> str:
        """The answer as the prompt asks for it: `#### 7` becomes `\\boxed{7}`, and an answer without any gets one."""
        if "\\boxed" not in self.suffix.text or last_boxed(answer) is not None:
            return answer
        self.completed += 1
        found = marked(answer)
        if found is not None:
            return f"{answer.rpartition(MARKER)[0].rstrip()}\n\\boxed{{{found}}}".lstrip()
        return f"\\boxed{{{truth}}}" if answer == truth else f"{answer}\n\\boxed{{{truth}}}"


def task(data_source: str, instruction: str | None) -> Task:
    """`instruction`: what every question ends with; None for the one that asks for a `\\boxed{}`."""
    problems = BoxedProblems(instruction)

    def convert(row: Row, origin: Origin) -> Row:
        question, answer, truth = problems.read(row)
        return question_row(origin, problems.suffix.prompt(question), question, answer, truth)

    needed = {"question": QUESTION, "answer": ANSWER}
    return Task("informal-math", data_source, QUESTION_SCHEMA, convert, needed, problems.describe, problems.suffix.text)

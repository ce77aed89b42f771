"""Which columns are taken for the question, the worked answer and the final answer."""

from typing import Any

import pytest

from apollo_sft.prepare.columns import Finder, as_text
from apollo_sft.prepare.records import BOXED_INSTRUCTION, GSM8K_INSTRUCTION
from apollo_sft.prepare.rejection import RejectedRow

CHAT = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]


@pytest.mark.parametrize(
    ("row", "question"),
    [
        ({"question": " 1? ", "problem": "2?"}, "1?"),
        ({"question": None, "problem": "2?"}, "2?"),
        ({"question": "  ", "Problem": "3?"}, "3?"),
        ({"prompt": [{"role": "user", "content": "4?"}]}, "4?"),
        ({"prompt": [{"role": "system", "content": BOXED_INSTRUCTION}, {"role": "user", "content": "5?"}]}, "5?"),
        ({"instruction": ["6", "?"]}, "6\n?"),
        ({"extra_info": {"question": "7?"}}, "7?"),
        ({"messages": CHAT}, "Q"),
        ({"question": f"8? {GSM8K_INSTRUCTION}"}, "8?"),
        ({"question": f"{BOXED_INSTRUCTION}9?"}, "9?"),
    ],
)
def test_the_first_question_that_is_not_empty(row: dict[str, Any], question: str) -> None:
    assert Finder().question(row) == question


@pytest.mark.parametrize(
    ("row", "answer", "truth"),
    [
        ({"answer": "2 + 2 = 4\n#### 4"}, "2 + 2 = 4\n#### 4", "4"),
        ({"answer": "33", "solution": "so \\boxed{33}"}, "so \\boxed{33}", "33"),
        ({"solution": "so \\boxed{\\frac{1}{2}}"}, "so \\boxed{\\frac{1}{2}}", "\\frac{1}{2}"),
        ({"answer": "", "cot": "thus 5", "final_answer": 5}, "thus 5", "5"),
        ({"answer": "a\nlong text", "target": "6"}, "a\nlong text", "6"),
        ({"solution": "no box", "ground_truth": "7"}, "no box", "7"),
        ({"response": "eight", "reward_model": {"ground_truth": "8"}}, "eight", "8"),
        ({"solution": "nothing marked"}, "nothing marked", None),
        ({"messages": CHAT}, "A", None),
    ],
)
def test_the_worked_and_the_final_answer(row: dict[str, Any], answer: str, truth: str | None) -> None:
    finder = Finder()
    assert (finder.answer(row), finder.truth(row)) == (answer, truth)


def test_rows_without_a_text_are_rejected() -> None:
    for row in ({}, {"question": None}, {"question": " \n"}, {"question": GSM8K_INSTRUCTION}):
        with pytest.raises(RejectedRow, match="no question"):
            Finder().question(row)
    for row in ({}, {"answer": None}, {"answer": "", "solution": "  "}):
        with pytest.raises(RejectedRow, match="no answer"):
            Finder().answer(row)


def test_a_conversation_is_not_cut_down_to_a_question() -> None:
    with pytest.raises(RejectedRow, match="a conversation"):
        Finder().question({"messages": [*CHAT, *CHAT]})
    with pytest.raises(RejectedRow, match="a conversation"):
        Finder().question({"prompt": [{"role": "system", "content": "Be rude."}, CHAT[0]]})


def test_what_was_taken_is_said_and_what_was_not() -> None:
    finder = Finder()
    for row in ({"question": "1?", "problem": "one?"}, {"question": "", "problem": "2?"}, {"question": "3?"}):
        finder.question(row)
    (line,) = finder.describe()
    assert line == "question: column question (2 rows), problem (1 rows); also there, not used: problem"


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, ""), (3, "3"), (["a", None, " b"], "a\nb"), ({"x": "ä"}, '{"x": "ä"}'), (True, "true")],
)
def test_cells_as_text(value: object, text: str) -> None:
    assert as_text(value) == text

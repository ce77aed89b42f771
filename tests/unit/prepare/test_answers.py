"""Final answers in worked solutions."""

import pytest

from apollo_sft.prepare.answers import final_answer, last_boxed, marked
from apollo_sft.prepare.rejection import RejectedRow


@pytest.mark.parametrize(
    ("text", "boxed"),
    [
        (r"so \boxed{7}", "7"),
        (r"\boxed{1} and then $\boxed{\frac{1}{\sqrt{2}}}$.", r"\frac{1}{\sqrt{2}}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\left\{ x \right.} is half open", r"\left\{ x \right."),
        (r"\boxed{a\\}", r"a\\"),
        (r"\fbox{3} cm", "3"),
        (r"$\boxed 7$", "7"),
        (r"\boxed{ 12 }", "12"),
        ("no box", None),
    ],
)
def test_the_last_box_with_its_nested_braces(text: str, boxed: str | None) -> None:
    assert last_boxed(text) == boxed


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (r"\boxed{1} then \boxed{2", r"the last \boxed{ is not closed"),
        (r"\boxed{\frac{1}{2}", r"the last \boxed{ is not closed"),
        (r"\boxed{1\}", r"the last \boxed{ is not closed"),
        (r"\boxed{ }", r"the last \boxed{} is empty"),
    ],
)
def test_an_open_or_empty_box_rejects_the_row(text: str, reason: str) -> None:
    with pytest.raises(RejectedRow) as caught:
        final_answer(text)
    assert caught.value.reason == reason


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("2 + 2 = 4\n#### 4", "4"),
        ("#### 1\nno\n#### 1,234,567 \nmore", "1234567"),
        ("#### -3.5", "-3.5"),
        ("#### (1,2)", "(1,2)"),
        ("####\n", None),
        ("none", None),
    ],
)
def test_the_last_marker_without_thousands_separators(text: str, answer: str | None) -> None:
    assert marked(text) == answer


def test_a_box_comes_before_a_marker() -> None:
    assert final_answer("\\boxed{5}\n#### 6") == "5"
    assert final_answer("#### 6") == "6"
    assert final_answer("six") is None

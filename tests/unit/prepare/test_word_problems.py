from __future__ import annotations

import re
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from apollo_sft.prepare.word_problems import LARGEST, MAX_PROBLEMS, NAMES, THINGS, generate, write_word_problems

STEP = re.compile(r"(\d+) ([+-]) (\d+) = (\d+)")


def test_same_seed_same_problems_other_seed_others():
    assert generate(50, 10, seed=3) == generate(50, 10, seed=3)
    assert generate(50, 10, seed=3) != generate(50, 10, seed=4)


def test_no_question_occurs_twice_and_none_is_in_both_sets():
    train, test = generate(5000, 200, seed=0)
    questions = [p.question for p in (*train, *test)]
    assert (len(train), len(test)) == (5000, 200)
    assert len(set(questions)) == 5200


def test_every_answer_is_worked_out_right_within_the_numbers():
    for problem in generate(4000, 0, seed=1)[0]:
        *steps, last = problem.answer.split("\n")
        result = None
        for line in steps:
            left, sign, right, result = STEP.fullmatch(line).groups()
            assert int(result) == int(left) + int(right) * (1 if sign == "+" else -1)
            assert all(0 <= int(number) <= LARGEST for number in (left, right, result))
        assert last == f"#### {result}" == f"#### {problem.result}"
        assert len(steps) == problem.num_steps


def test_every_fact_of_the_answer_is_in_the_question():
    for problem in generate(4000, 0, seed=2)[0]:
        steps = [STEP.fullmatch(line).groups() for line in problem.answer.split("\n")[:-1]]
        needed = [steps[0][0], *(right for _, _, right, _ in steps)]
        assert re.findall(r"\d+", problem.question) == needed
        assert "{" not in problem.question


def test_wording_is_varied_and_grammatical():
    train, _ = generate(8000, 0, seed=5)
    shapes = {re.sub("|".join((*NAMES, *THINGS, *(t[:-1] for t in THINGS), r"\d+")), "_", p.question) for p in train}
    assert len(shapes) >= 12
    assert sum(p.num_steps == 2 for p in train) / len(train) == pytest.approx(0.3, abs=0.03)
    plural_of_one = re.compile(rf"\b1 (more )?({'|'.join(THINGS)})\b")
    assert not any(plural_of_one.search(p.question) for p in train)
    assert {p.result for p in train} == set(range(LARGEST + 1))


def test_too_many_problems_are_refused():
    with pytest.raises(ValueError, match="at most"):
        generate(MAX_PROBLEMS, 1, seed=0)


def test_written_files_hold_the_same_problems_in_both_layouts(tmp_path: Path):
    write_word_problems(tmp_path, 60, 20, seed=7)
    train, test = generate(60, 20, seed=7)
    for split, problems in (("train", train), ("test", test)):
        rows = pq.read_table(tmp_path / "single_turn" / f"{split}.parquet").to_pylist()
        assert [row["extra_info"] for row in rows] == [
            {"split": split, "index": i, "question": p.question, "answer": p.answer} for i, p in enumerate(problems)
        ]
        assert rows[0]["prompt"] == [{"role": "user", "content": problems[0].question}]
        assert [row["reward_model"]["ground_truth"] for row in rows] == [str(p.result) for p in problems]
        chats = pq.read_table(tmp_path / "multiturn" / f"{split}.parquet")["messages"].to_pylist()
        assert {len(chat) for chat in chats} == {2, 4, 6}
        said = [message for chat in chats for message in chat]
        assert [m["content"] for m in said if m["role"] == "user"] == [p.question for p in problems]
        assert [m["content"] for m in said if m["role"] == "assistant"] == [p.answer for p in problems]
        assert [m["role"] for m in said[:2]] == ["user", "assistant"]


def test_files_are_the_same_every_time(tmp_path: Path):
    for name in ("a", "b"):
        write_word_problems(tmp_path / name, 30, 10, seed=7)
    for file in ("single_turn/train.parquet", "multiturn/test.parquet"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()

"""Generate small word problems from a seed: files for the demo, in both layouts that the trainer reads.

A problem has one or two steps over the numbers 0 to 20, and its text holds every fact that its answer needs. A small
model can learn to read the twelve forms and the table of sums behind them; it learns no arithmetic beyond that.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

LARGEST = 20
TWO_STEP_RATIO = 0.3
MAX_PROBLEMS = 200_000
"""Far below the number of different questions, so drawing until all are different ends soon."""

NAMES = (
    *("Alice", "Ben", "Clara", "David", "Emma", "Felix", "Grace", "Henry"),
    *("Ivy", "Jack", "Kate", "Leo", "Mia", "Noah", "Olga", "Paul"),
)
THINGS = (
    *("apples", "balls", "books", "cards", "coins", "eggs"),
    *("flowers", "marbles", "pencils", "shells", "stamps", "stickers"),
)


@dataclass(frozen=True, slots=True)
class Problem:
    """A question, its worked answer (ends in `#### result`), and the result."""

    question: str
    answer: str
    result: int
    num_steps: int


@dataclass(frozen=True, slots=True)
class Form:
    """How a question is worded, and the operations on its numbers from left to right.

    In `text`: `{a}`, `{b}`, `{c}` are numbers; `{a_things}` is a number with its noun (`1 coin`), `{b_more}` the same
    with `more` between (`2 more coins`); `{things}` is the plural; `{n}` and `{m}` are two different names.
    """

    text: str
    operations: tuple[str, ...]


ONE_STEP = (
    Form("{n} has {a_things}. {n} finds {b} more. How many {things} does {n} have now?", ("+",)),
    Form("{n} has {a_things} and {m} has {b_things}. How many {things} do they have together?", ("+",)),
    Form("A box holds {a_things}. {n} puts {b} more into it. How many {things} does the box hold now?", ("+",)),
    Form("{n} has {a_things}. {m} has {b_more} than {n}. How many {things} does {m} have?", ("+",)),
    Form("{n} has {a_things} and gives {b} of them away. How many {things} does {n} have left?", ("-",)),
    Form("{n} has {a_things} and {m} has {b_things}. How many more {things} does {n} have than {m}?", ("-",)),
    Form("A box holds {a_things}. {n} takes {b} of them out. How many {things} does the box hold now?", ("-",)),
    Form("{n} wants to have {a_things} and has {b} so far. How many more {things} does {n} need?", ("-",)),
)
TWO_STEP = (
    Form(
        "{n} has {a_things}. {m} gives {n} {b} more. Then {n} loses {c}. How many {things} does {n} have now?",
        ("+", "-"),
    ),
    Form("{n} has {a_things}, gives {b} to {m} and buys {c} more. How many {things} does {n} have now?", ("-", "+")),
    Form(
        "{n} finds {a_things} on Monday, {b} on Tuesday and {c} on Friday. How many {things} are found in all?",
        ("+", "+"),
    ),
    Form("{n} has {a_things}, sells {b} today and {c} tomorrow. How many {things} does {n} keep?", ("-", "-")),
)


def generate(num_train: int, num_test: int, seed: int) -> tuple[list[Problem], list[Problem]]:
    """Generate training and held-out problems, all with different questions. The same arguments: the same problems.

    Raises: ValueError for more problems than can safely be made different.
    """
    if num_train + num_test > MAX_PROBLEMS:
        raise ValueError(f"at most {MAX_PROBLEMS} problems, found {num_train} + {num_test}")

    rng = random.Random(seed)
    problems: dict[str, Problem] = {}
    while len(problems) < num_train + num_test:
        problem = _draw(rng)
        problems.setdefault(problem.question, problem)

    drawn = list(problems.values())
    # Held-out problems come first: with more training data they stay the same.
    test = drawn[:num_test]
    train = drawn[num_test:]
    held_out = {problem.question for problem in test}
    assert not any(problem.question in held_out for problem in train)
    return train, test


def write_word_problems(folder: Path, num_train: int, num_test: int, seed: int) -> None:
    """Write `single_turn/` and `multiturn/`, each with `train.parquet` and `test.parquet`, into `folder`.

    Both hold the same problems. `single_turn` has one problem a row, in the columns of GSM8K as RL and SFT trainers
    prepare it; `multiturn` has conversations of one to three problems in a `messages` column.
    """
    train, test = generate(num_train, num_test, seed)
    for split, problems in (("train", train), ("test", test)):
        _write(folder / "single_turn" / f"{split}.parquet", [_row(p, split, i) for i, p in enumerate(problems)])
        groups = _groups(problems, random.Random(seed))
        _write(folder / "multiturn" / f"{split}.parquet", [_chat(g, split, i) for i, g in enumerate(groups)])


def _draw(rng: random.Random) -> Problem:
    forms: tuple[Form, ...] = ONE_STEP
    if rng.random() < TWO_STEP_RATIO:
        forms = TWO_STEP

    form = rng.choice(forms)
    numbers, steps = _numbers(rng, form.operations)
    name, other = rng.sample(NAMES, 2)
    things = rng.choice(THINGS)
    facts: dict[str, object] = {"n": name, "m": other, "things": things}
    for key, number in zip("abc", numbers, strict=False):
        noun = things
        if number == 1:
            noun = things.removesuffix("s")
        facts |= {key: number, f"{key}_things": f"{number} {noun}", f"{key}_more": f"{number} more {noun}"}

    lines = [f"{left} {sign} {right} = {result}" for left, sign, right, result in steps]
    result = steps[-1][-1]
    return Problem(form.text.format(**facts), "\n".join([*lines, f"#### {result}"]), result, len(steps))


def _numbers(rng: random.Random, operations: Sequence[str]) -> tuple[list[int], list[tuple[int, str, int, int]]]:
    """Draw numbers whose steps all stay within 0 to 20; return them, and the steps as (left, sign, right, result).

    The first number is 0 to 20, the others 1 to 20: nobody gives 0 coins away.
    """
    # Drawn again until all steps fit: adjusting the numbers would make some of them more likely.
    while True:
        numbers = [rng.randint(0, LARGEST), *(rng.randint(1, LARGEST) for _ in operations)]
        steps = []
        left = numbers[0]
        for sign, right in zip(operations, numbers[1:], strict=True):
            result = left + right
            if sign == "-":
                result = left - right
            steps.append((left, sign, right, result))
            left = result
        if all(0 <= result <= LARGEST for *_, result in steps):
            return numbers, steps


def _row(problem: Problem, split: str, index: int) -> dict[str, Any]:
    return {
        "data_source": "apollo-sft/word-problems",
        "prompt": [{"role": "user", "content": problem.question}],
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": str(problem.result)},
        "extra_info": {"split": split, "index": index, "question": problem.question, "answer": problem.answer},
    }


def _groups(problems: Sequence[Problem], rng: random.Random) -> Iterator[Sequence[Problem]]:
    start = 0
    while start < len(problems):
        size = rng.randint(1, 3)
        yield problems[start : start + size]
        start += size


def _chat(problems: Sequence[Problem], split: str, index: int) -> dict[str, Any]:
    messages = []
    for problem in problems:
        messages.append({"role": "user", "content": problem.question})
        messages.append({"role": "assistant", "content": problem.answer})

    return {
        "data_source": "apollo-sft/word-problems",
        "messages": messages,
        "extra_info": {"split": split, "index": index},
    }


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)

"""Generated conversations: enough, all different, and no turn but the first can be answered alone."""

import re

import pytest

from apollo_sft.errors import ConfigError
from apollo_sft.prepare.multiturn import NUM_TEST, NUM_TRAIN, generated_source
from apollo_sft.types import Message

CHANGE = re.compile(r"(\d+) ([+-]) (\d+) = (\d+)\n#### (\d+)")


@pytest.fixture(scope="module")
def chats() -> dict[str, list[list[Message]]]:
    source = generated_source(NUM_TRAIN, NUM_TEST, seed=1)
    return {split: [row["messages"] for _, row in source.rows(split)] for split in source.splits}


def test_enough_for_the_default_batch_and_none_held_out_is_trained(chats: dict[str, list[list[Message]]]) -> None:
    assert len(chats["train"]) >= 2000 and len(chats["test"]) >= 200
    first = {split: {chat[0]["content"] for chat in found} for split, found in chats.items()}
    assert len(first["train"]) == len(chats["train"]) and not first["train"] & first["test"]
    assert all([m["role"] for m in chat] == ["user", "assistant"] * (len(chat) // 2) for chat in chats["train"])
    assert {len(chat) for chat in chats["train"]} == {4, 6, 8, 10}


def test_every_later_answer_starts_from_a_number_that_its_question_does_not_say(
    chats: dict[str, list[list[Message]]],
) -> None:
    for chat in chats["train"][:500]:
        count = None
        for question, answer in zip(chat[::2], chat[1::2], strict=True):
            step = CHANGE.fullmatch(answer["content"])
            if step is None:
                assert answer["content"].startswith(("It began with", "Before it there were"))
                continue
            left, sign, right, result, final = step.groups()
            assert int(result) == (int(left) + int(right) if sign == "+" else int(left) - int(right)) >= 0
            assert final == result
            assert count is None or int(left) == count
            changes = count is None or (
                "How many more" not in question["content"] and "twice" not in question["content"]
            )
            count = int(result) if changes else count


def test_the_seed_says_everything() -> None:
    one, same, other = (generated_source(50, 10, seed).generated for seed in (1, 1, 2))
    assert one == same != other


@pytest.mark.parametrize(("train", "test"), [(0, 10), (10, 0), (20_000, 1)])
def test_numbers_that_cannot_be_made(train: int, test: int) -> None:
    with pytest.raises(ConfigError, match="--num_train and --num_test"):
        generated_source(train, test, seed=1)

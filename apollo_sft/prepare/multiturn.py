"""Generate conversations from a seed: a number of things changes from turn to turn, so each answer needs those before.

Only the first turn names the number; one kind of question is about the beginning, one about the turn before.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field

from apollo_sft.data.read.files import Row
from apollo_sft.errors import ConfigError
from apollo_sft.prepare.preparation import Task
from apollo_sft.prepare.raw_sources import Source
from apollo_sft.prepare.records import CHAT_SCHEMA, Origin, chat_row
from apollo_sft.prepare.word_problems import NAMES, THINGS
from apollo_sft.types import Message

DATA_SOURCE = "apollo-sft/multiturn"
NUM_TRAIN = 2048
NUM_TEST = 256
LARGEST = 20
MAX_CONVERSATIONS = 20_000
"""Far below the number of different first questions, so drawing until all are different ends soon."""


Turn = tuple[str, str, int]
"""The user's text, the working, the result."""
Kind = Callable[[random.Random, "Story"], Turn]


@dataclass(slots=True)
class Story:
    """Who has how many of what."""

    name: str
    other: str
    things: str

    counts: list[int] = field(default_factory=list)
    """The number at first and after each change."""

    asked: list[Kind] = field(default_factory=list)
    """Kinds of turns so far."""

    def noun(self, number: int) -> str:
        """Return a number with its noun."""
        if number == 1:
            return f"1 {self.things.removesuffix('s')}"
        return f"{number} {self.things}"


def generated_source(num_train: int, num_test: int, seed: int) -> Source:
    """Generate training and held-out conversations, all with different first questions. The same seed: the same rows.

    Raises: ConfigError for more conversations than can safely be made different, or none.
    """
    # Conversations are drawn until all are different: far more would take forever.
    if not (num_train > 0 and num_test > 0 and num_train + num_test <= MAX_CONVERSATIONS):
        raise ConfigError(
            "--num_train and --num_test cannot be made",
            found=f"{num_train} and {num_test}",
            expected=f"both at least 1, and together at most {MAX_CONVERSATIONS:,}",
        )

    rng = random.Random(seed)
    drawn: dict[str, Row] = {}
    while len(drawn) < num_train + num_test:
        row = _conversation(rng)
        drawn.setdefault(row["messages"][0]["content"], row)

    rows = list(drawn.values())
    return Source("generated", f"seed {seed}", None, {}, {"train": rows[num_test:], "test": rows[:num_test]})


def task() -> Task:
    """Return the task."""

    def convert(row: Row, origin: Origin) -> Row:
        return chat_row(origin, row["messages"], None, row["truth"])

    return Task("multiturn", DATA_SOURCE, CHAT_SCHEMA, convert, {}, lambda: [])


def _conversation(rng: random.Random) -> Row:
    name, other = rng.sample(NAMES, 2)
    story = Story(name, other, rng.choice(THINGS))
    turns = [_opening(rng, story)]
    for _ in range(rng.randint(1, 4)):
        kind = rng.choice(_possible(story))
        story.asked.append(kind)
        turns.append(kind(rng, story))

    messages: list[Message] = []
    for question, working, result in turns:
        messages.append({"role": "user", "content": question})
        messages.append({"role": "assistant", "content": f"{working}\n#### {result}"})

    return {"messages": messages, "truth": str(turns[-1][2])}


def _opening(rng: random.Random, story: Story) -> Turn:
    start = rng.randint(1, LARGEST // 2)
    more = rng.randint(1, LARGEST // 2)
    story.counts += [start, start + more]
    name = story.name
    things = story.things
    text = rng.choice(
        (
            f"{name} has {story.noun(start)} and finds {more} more. How many {things} does {name} have now?",
            f"{name} has {story.noun(start)} and gets {more} more from {story.other}. How many are there now?",
            f"There are {story.noun(start)} in {name}'s bag. {name} puts {more} more in. How many {things} are in it?",
        )
    )
    return text, f"{start} + {more} = {start + more}", start + more


def _possible(story: Story) -> list[Kind]:
    """Return the turns that can follow. Nothing is taken away that is not there; other questions come only once."""
    changes: list[Kind] = []
    if story.counts[-1] > 1:
        changes.append(_lose)
    if story.counts[-1] < LARGEST:
        changes.append(_gain)

    others: list[Kind] = [kind for kind in (_beginning, _before, _twice, _compare) if kind not in story.asked]
    return [*changes, *changes, *others]


def _gain(rng: random.Random, story: Story) -> Turn:
    now = story.counts[-1]
    more = rng.randint(1, LARGEST - now)
    story.counts.append(now + more)
    text = rng.choice(
        (f"Then {more} more come. How many is that?", f"Now {story.name} buys {more} more. How many now?")
    )
    return text, f"{now} + {more} = {now + more}", now + more


def _lose(rng: random.Random, story: Story) -> Turn:
    now = story.counts[-1]
    less = rng.randint(1, now - 1)
    story.counts.append(now - less)
    text = rng.choice(
        (f"{story.name} gives {less} of them away. How many are left?", f"Then {less} are lost. How many remain?")
    )
    return text, f"{now} - {less} = {now - less}", now - less


def _compare(rng: random.Random, story: Story) -> Turn:
    now = story.counts[-1]
    others = rng.randint(1, now)
    text = f"{story.other} has {others}. How many more does {story.name} have than {story.other}?"
    return text, f"{now} - {others} = {now - others}", now - others


def _twice(rng: random.Random, story: Story) -> Turn:
    del rng
    now = story.counts[-1]
    text = f"Suppose {story.name} had twice as many as now. How many {story.things} would that be?"
    return text, f"{now} + {now} = {2 * now}", 2 * now


def _beginning(rng: random.Random, story: Story) -> Turn:
    del rng
    start = story.counts[0]
    return f"How many {story.things} were there at the very beginning?", f"It began with {start}.", start


def _before(rng: random.Random, story: Story) -> Turn:
    del rng
    before = story.counts[-2]
    return "How many were there before the last change?", f"Before it there were {before}.", before

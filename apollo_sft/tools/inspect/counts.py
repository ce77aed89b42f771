"""Count, compare and write out the samples of stores, for a person or a CI job. Training does not come here."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np

from apollo_sft.data.batch.plan import PlanSpec, plan, steps_per_epoch
from apollo_sft.data.store.audit import decoded, target_mask
from apollo_sft.data.store.bad_rows import NUMBERS, reason_and_found
from apollo_sft.data.store.store_files import Rejected, SampleStore
from apollo_sft.types import RowRef

Kind = Literal["refused", "dropped", "cut", "incomplete", "left out", "set aside"]
"""Incomplete: replies without a part that the row has and the template does not write. Left out: turns
(data.history). Set aside: the row itself excludes all its turns from training."""
NAMED = 5
MOST_BARS = 16
MOST_STEPS = 512
"""The most steps of an epoch that are planned to see how they are packed. They are spread over the epoch."""


@dataclass(slots=True)
class FileCounts:
    """The rows of one file, and what of them is trained."""

    file: str
    rows: int = 0
    rows_trained: int = 0
    samples: int = 0
    tokens: int = 0
    targets: int = 0

    tokens_lost: int = 0
    """Rendered tokens that are not trained."""

    targets_lost: int = 0
    """The targets among them."""


@dataclass(slots=True)
class Found:
    """Something that was found several times."""

    count: int = 0

    examples: list[str] = field(default_factory=list)
    """The first rows with it."""

    def add(self, example: str) -> None:
        """Count it once more, in the row `example`."""
        self.count += 1
        if len(self.examples) < NAMED:
            self.examples.append(example)


@dataclass(slots=True)
class Loss:
    """Rows that are not trained (refused, dropped) or not completely (cut, turns left out) for one reason."""

    kind: Kind
    reason: str

    found: str = ""
    """What is wrong in the first of them."""

    samples: int = 0
    """Their samples with that loss. A row that was refused counts as one."""

    tokens: int = 0
    targets: int = 0
    rows: set[tuple[str, int]] = field(default_factory=set)
    examples: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Scan:
    """One pass over the samples of a store."""

    digests: np.ndarray
    """uint64 of shape (samples,), equal where the token ids are."""

    unstopped: Found
    """Samples without a stop token among their targets."""


@dataclass(frozen=True, slots=True)
class Packing:
    """How the steps of an epoch fill their forwards."""

    steps_seen: int
    """The steps that were planned for this."""

    forwards_per_step: float
    samples_per_forward: float
    tokens_per_forward: float
    most_tokens: int

    padding_ratio: float
    """The share of padding in all tokens that are computed."""

    padded_ratio: float
    """The same if each forward were a rectangle as long as its longest sample."""

    fill_ratio: float | None
    """The share of the tokens that a forward may hold; None where only samples are counted."""

    imbalance: float
    """See `StepPlan.imbalance`."""


def count_files(store: SampleStore) -> list[FileCounts]:
    """Return the counts of each file, in the order of reading. Every row is in a sample or in the ledger."""
    counts = [FileCounts(file) for file in store.summary.files]
    of_file = {file: index for index, file in enumerate(store.summary.files)}
    lost: list[set[int]] = [set() for _ in counts]
    for entry in store.rejected():
        index = of_file[entry.file]
        lost[index].add(entry.row)
        counts[index].tokens_lost += entry.tokens_lost
        counts[index].targets_lost += entry.targets_lost

    for index, count in enumerate(counts):
        mine = np.flatnonzero(store.sources == index)
        trained = np.unique(store.rows[mine])
        count.rows_trained = len(trained)
        count.rows = len(trained) + len(lost[index].difference(trained.tolist()))
        count.samples = len(mine)
        count.tokens = int(store.lengths[mine].sum(dtype=np.int64))
        count.targets = int(store.num_targets[mine].sum(dtype=np.int64))

    return counts


def losses(entries: Iterable[Rejected]) -> list[Loss]:
    """Return the ledger by kind and reason, the largest first.

    Reasons that differ only in numbers, or in what was found in a row, are one: the numbers are those of the first row.
    """
    found: dict[tuple[Kind, str], Loss] = {}
    for entry in entries:
        kind = kind_of(entry)
        place = (entry.file, entry.row)
        reason, found_there = reason_and_found(entry.reason, str(RowRef(*place)))
        loss = found.setdefault((kind, NUMBERS.sub("…", reason)), Loss(kind, reason, found_there))
        if place not in loss.rows and len(loss.examples) < NAMED:
            example = str(RowRef(*place))
            if entry.unwritten:
                example += ", turn " + ", ".join(map(str, entry.turns))
            loss.examples.append(example)
        loss.rows.add(place)
        loss.samples += 1
        loss.tokens += entry.tokens_lost
        loss.targets += entry.targets_lost

    # A single sample keeps its numbers; several share a reason without them.
    for (_, reason), loss in found.items():
        if loss.samples > 1:
            loss.reason = reason

    return sorted(found.values(), key=lambda loss: -len(loss.rows))


def kind_of(entry: Rejected) -> Kind:
    """Return the kind of an entry of the ledger."""
    if entry.unwritten:
        return "incomplete"
    if entry.trained and entry.tokens_lost:
        return "cut"
    if entry.trained:
        return "left out"
    if entry.targets_lost or entry.turns:
        return "dropped"
    if entry.tokens_lost:
        return "set aside"
    return "refused"


def scan(store: SampleStore) -> Scan:
    """Hash every sample, and look for its stop tokens."""
    stops = list(store.summary.stop_tokens)
    digests = np.empty(len(store), dtype=np.uint64)
    unstopped = Found()
    for index in range(len(store)):
        ids, labels = store.tokens(index)
        digest = hashlib.blake2b(ids.tobytes(), digest_size=8).digest()
        digests[index] = int.from_bytes(digest, "little")
        if not any((labels == stop).any() for stop in stops):
            unstopped.add(str(store.ref(index)))

    return Scan(digests, unstopped)


def duplicates(store: SampleStore, digests: np.ndarray) -> Found:
    """Return the samples whose token ids an earlier sample has too; examples are written `this row = that row`."""
    order = np.argsort(digests, kind="stable")
    repeats = np.flatnonzero(digests[order][1:] == digests[order][:-1]) + 1
    if not len(repeats):
        return Found()

    _, first = np.unique(digests, return_index=True)
    originals = dict(zip(digests[first].tolist(), first.tolist(), strict=True))
    again = np.sort(order[repeats]).tolist()
    pairs = (f"{store.ref(index)} = {store.ref(originals[int(digests[index])])}" for index in again)
    return Found(len(again), _first_different(pairs))


def overlap(train: SampleStore, train_digests: np.ndarray, val: SampleStore, val_digests: np.ndarray) -> Found:
    """Return the validation samples that are trained on, token by token."""
    unique, first = np.unique(train_digests, return_index=True)
    shared = np.flatnonzero(np.isin(val_digests, unique))
    same = first[np.searchsorted(unique, val_digests[shared])]
    pairs = (f"{val.ref(i)} = {train.ref(at)}" for i, at in zip(shared.tolist(), same.tolist(), strict=True))
    return Found(len(shared), _first_different(pairs))


def _first_different(texts: Iterable[str]) -> list[str]:
    """Return the first few, each once: a row of several samples is named once."""
    found: dict[str, None] = {}
    for text in texts:
        found[text] = None
        if len(found) == NAMED:
            break
    return list(found)


def histogram(lengths: np.ndarray) -> list[tuple[int, int, int]]:
    """Return (shortest, longest, samples) of each bar, from the shortest sample to the longest.

    Bars are equally wide: 1, 2 or 5 times a power of ten tokens.
    """
    shortest = int(lengths.min())
    longest = int(lengths.max())
    width = 1
    while longest // width - shortest // width >= MOST_BARS:
        power = 10 ** (len(str(width)) - 1)
        width = {1: 2, 2: 5, 5: 10}[width // power] * power

    first = shortest // width
    counts = np.bincount(lengths // width - first)
    return [(max(bar * width, 1), (bar + 1) * width - 1, int(count)) for bar, count in enumerate(counts, first)]


def packing(lengths: np.ndarray, spec: PlanSpec, multiple: int) -> Packing:
    """Plan the steps of the first epoch, see `MOST_STEPS`. `multiple`: as in `loader.pack`."""
    in_epoch = steps_per_epoch(len(lengths), spec)
    steps = range(0, in_epoch, -(-in_epoch // MOST_STEPS))
    total = 0
    padding = 0
    rectangles = 0
    num_samples = 0
    num_forwards = 0
    most = 0
    imbalance = 0.0
    for step in steps:
        planned = plan(lengths, spec, step)
        tokens = lengths[planned.samples].astype(np.int64)
        forwards = planned.rank_of * planned.num_forwards + planned.forward_of
        number = spec.dp_size * planned.num_forwards
        filled = np.bincount(forwards, tokens, number).astype(np.int64)
        longest = np.zeros(number, dtype=np.int64)
        np.maximum.at(longest, forwards, tokens)

        total += int(filled.sum())
        # A forward without a sample runs too, on padding alone: its rank takes part in the collectives.
        padding += int(np.where(filled > 0, -filled % multiple, multiple).sum())
        rectangles += int((longest * np.bincount(forwards, minlength=number)).sum())
        num_samples += len(tokens)
        num_forwards += number
        most = max(most, int(filled.max()))
        imbalance += planned.imbalance()

    fill_ratio = None
    if spec.max_tokens:
        fill_ratio = total / (num_forwards * spec.max_tokens)
    return Packing(
        steps_seen=len(steps),
        forwards_per_step=num_forwards / spec.dp_size / len(steps),
        samples_per_forward=num_samples / num_forwards,
        tokens_per_forward=total / num_forwards,
        most_tokens=most,
        padding_ratio=padding / (total + padding),
        padded_ratio=1 - total / rectangles,
        fill_ratio=fill_ratio,
        imbalance=imbalance / len(steps),
    )


def target_texts(store: SampleStore, index: int, tokenizer: Any) -> list[str]:
    """Return the text of each stretch of targets of one sample, in order."""
    sample = store[index]
    # False on both sides: a stretch at the start or the end has two edges too.
    mask = np.concatenate([[False], target_mask(sample), [False]])
    edges = np.flatnonzero(np.diff(mask)).tolist()
    return [decoded(tokenizer, sample.input_ids, first, end) for first, end in list(pairwise(edges))[::2]]


def write_dump(stores: Iterable[tuple[str, SampleStore]], tokenizer: Any, path: Path) -> int:
    """Write one JSON line a sample, with its labels as they are trained. Return the number of lines."""
    number = 0
    with path.open("w", encoding="utf-8") as file:
        for split, store in stores:
            for index in range(len(store)):
                sample = store[index]
                line = {
                    "split": split,
                    "file": sample.ref.file,
                    "row": sample.ref.row,
                    "turns": sample.turns,
                    "input_ids": sample.input_ids.tolist(),
                    "labels": sample.labels.tolist(),
                    "targets": target_texts(store, index, tokenizer),
                }
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
                number += 1

    return number

"""What a person or a CI job wants to know of stores: counted, compared, written out. Training does not come here."""

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
(data.history). Set aside: nothing in the row was to be trained, by its own word."""
NAMED = 5
MOST_BARS = 16
MOST_STEPS = 512
"""Steps of an epoch that are planned to see how they are packed; of more, as many are spread over it."""


@dataclass(slots=True)
class FileCounts:
    """What became of the rows of one file. Lost: what of its renderings is not trained."""

    file: str
    rows: int = 0
    rows_trained: int = 0
    samples: int = 0
    tokens: int = 0
    targets: int = 0
    tokens_lost: int = 0
    targets_lost: int = 0


@dataclass(slots=True)
class Found:
    """Something that was met `count` times, first in the rows `examples`."""

    count: int = 0
    examples: list[str] = field(default_factory=list)

    def add(self, example: str) -> None:
        self.count += 1
        if len(self.examples) < NAMED:
            self.examples.append(example)


@dataclass(slots=True)
class Loss:
    """Rows that are not trained (refused, dropped) or not whole (cut, turns left out) for one reason.

    `samples`: of these rows, as many are concerned. A row that was refused counts as one. `found`: what is wrong in the
    first of them.
    """

    kind: Kind
    reason: str
    found: str = ""
    samples: int = 0
    tokens: int = 0
    targets: int = 0
    rows: set[tuple[str, int]] = field(default_factory=set)
    examples: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Scan:
    """One pass over the samples of a store. `digests`: uint64 of shape (samples,), equal where the token ids are.

    `unstopped`: samples none of whose targets is a stop token.
    """

    digests: np.ndarray
    unstopped: Found


@dataclass(frozen=True, slots=True)
class Packing:
    """How the steps of an epoch fill their forwards; of `steps_seen` steps.

    `padding_ratio`: tokens that only fill up, of all that are computed. `padded_ratio`: the same if each forward were
    a rectangle as long as its longest sample. `fill_ratio`: of the tokens that a forward may hold, None where only
    samples are counted. `imbalance`: see `StepPlan.imbalance`.
    """

    steps_seen: int
    forwards_per_step: float
    samples_per_forward: float
    tokens_per_forward: float
    most_tokens: int
    padding_ratio: float
    padded_ratio: float
    fill_ratio: float | None
    imbalance: float


def count_files(store: SampleStore) -> list[FileCounts]:
    """One entry a file, in the order in which the files are read. Every row is in a sample or in the ledger."""
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
    """The ledger, by kind and reason, the largest first. Numbers, and what was found in a row, make no reason of their
    own: they are those of the first one.
    """
    found: dict[tuple[Kind, str], Loss] = {}
    for entry in entries:
        kind, (reason, found_there) = kind_of(entry), reason_and_found(entry.reason, str(RowRef(entry.file, entry.row)))
        loss = found.setdefault((kind, NUMBERS.sub("…", reason)), Loss(kind, reason, found_there))
        place = (entry.file, entry.row)
        if place not in loss.rows and len(loss.examples) < NAMED:
            turns = ", turn " + ", ".join(map(str, entry.turns)) if entry.unwritten else ""
            loss.examples.append(f"{RowRef(*place)}{turns}")
        loss.rows.add(place)
        loss.samples += 1
        loss.tokens += entry.tokens_lost
        loss.targets += entry.targets_lost
    for (_, reason), loss in found.items():
        loss.reason = loss.reason if loss.samples == 1 else reason
    return sorted(found.values(), key=lambda loss: -len(loss.rows))


def kind_of(entry: Rejected) -> Kind:
    if entry.unwritten:
        return "incomplete"
    if entry.trained:
        return "cut" if entry.tokens_lost else "left out"
    if entry.targets_lost or entry.turns:
        return "dropped"
    return "set aside" if entry.tokens_lost else "refused"


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
    """Samples whose token ids an earlier sample has too; examples as `this row = that row`."""
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
    """Validation samples that are trained on, token by token."""
    unique, first = np.unique(train_digests, return_index=True)
    shared = np.flatnonzero(np.isin(val_digests, unique))
    same = first[np.searchsorted(unique, val_digests[shared])]
    pairs = (f"{val.ref(i)} = {train.ref(at)}" for i, at in zip(shared.tolist(), same.tolist(), strict=True))
    return Found(len(shared), _first_different(pairs))


def _first_different(texts: Iterable[str]) -> list[str]:
    """The first few, each once: a row of several samples is named once."""
    found: dict[str, None] = {}
    for text in texts:
        found[text] = None
        if len(found) == NAMED:
            break
    return list(found)


def histogram(lengths: np.ndarray) -> list[tuple[int, int, int]]:
    """(shortest, longest, samples) of each bar, from the shortest sample to the longest; bars are equally wide, of 1,
    2 or 5 times a power of ten tokens.
    """
    shortest, longest = int(lengths.min()), int(lengths.max())
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
    total = padding = rectangles = num_samples = num_forwards = most = 0
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
        padding += int(np.where(filled > 0, -filled % multiple, multiple).sum())
        rectangles += int((longest * np.bincount(forwards, minlength=number)).sum())
        num_samples, num_forwards = num_samples + len(tokens), num_forwards + number
        most = max(most, int(filled.max()))
        imbalance += planned.imbalance()
    return Packing(
        steps_seen=len(steps),
        forwards_per_step=num_forwards / spec.dp_size / len(steps),
        samples_per_forward=num_samples / num_forwards,
        tokens_per_forward=total / num_forwards,
        most_tokens=most,
        padding_ratio=padding / (total + padding),
        padded_ratio=1 - total / rectangles,
        fill_ratio=total / (num_forwards * spec.max_tokens) if spec.max_tokens else None,
        imbalance=imbalance / len(steps),
    )


def target_texts(store: SampleStore, index: int, tokenizer: Any) -> list[str]:
    """The text of each stretch of targets of one sample, in order."""
    sample = store[index]
    mask = np.concatenate([[False], target_mask(sample), [False]])
    edges = np.flatnonzero(np.diff(mask)).tolist()
    return [decoded(tokenizer, sample.input_ids, first, end) for first, end in list(pairwise(edges))[::2]]


def write_dump(stores: Iterable[tuple[str, SampleStore]], tokenizer: Any, path: Path) -> int:
    """One JSON line a sample, with its labels as they are trained. Returns the number of lines."""
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

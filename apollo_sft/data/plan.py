"""Which samples every micro-batch of every data rank holds at a given step: pure integers, no communication.

The plan is a function of the sample lengths, the spec and the step alone. Every rank computes the same one, so the
whole data state of a run is the step, and resuming on another number of ranks needs nothing else.
"""

import bisect
import heapq
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

Ids = np.ndarray
"""Sample ids, int64 of shape (samples,)."""


@dataclass(frozen=True, slots=True)
class PlanSpec:
    """`batch_size`: samples per step over all data ranks. `micro_batch_size`: samples per forward of one data rank.

    `max_tokens`: fill forwards by tokens instead; a longer sample is a forward of its own.
    `balance`: give the data ranks equal cost instead of equal numbers of samples. A sample of n tokens costs
    n + `attention_cost` * n², in tokens.
    """

    batch_size: int
    micro_batch_size: int
    dp_size: int
    seed: int
    shuffle: bool = True
    drop_last: bool = False
    max_tokens: int | None = None
    balance: bool = False
    attention_cost: float = 0.0


@dataclass(frozen=True, slots=True)
class StepPlan:
    """`samples`: ids of the whole step, in order. `micro_batches[dp_rank][i]`: ids of one forward.

    Every data rank has the same number of micro-batches; a rank that has fewer samples ends with empty ones.
    """

    epoch: int
    samples: Ids
    micro_batches: tuple[tuple[Ids, ...], ...]


def steps_per_epoch(num_samples: int, spec: PlanSpec) -> int:
    full, rest = divmod(num_samples, spec.batch_size)
    return full + (1 if rest and not spec.drop_last else 0)


def plan(lengths: np.ndarray, spec: PlanSpec, step: int) -> StepPlan:
    """The plan of `step` (from 0). `lengths`: tokens of each sample, shape (samples,)."""
    epoch, index = divmod(step, steps_per_epoch(len(lengths), spec))
    order = _epoch_order(len(lengths), spec.seed, epoch) if spec.shuffle else np.arange(len(lengths))
    samples = order[index * spec.batch_size : (index + 1) * spec.batch_size]
    per_rank = [_micro_batches(ids, lengths, spec) for ids in _assign(samples, lengths, spec)]
    num_forwards = max(1, *(len(forwards) for forwards in per_rank))
    empty = np.empty(0, dtype=np.int64)
    padded = (forwards + [empty] * (num_forwards - len(forwards)) for forwards in per_rank)
    return StepPlan(epoch, samples, tuple(tuple(forwards) for forwards in padded))


@lru_cache(maxsize=2)
def _epoch_order(num_samples: int, seed: int, epoch: int) -> Ids:
    return np.random.Generator(np.random.Philox([seed, epoch])).permutation(num_samples)


def attention_cost(hidden_size: int) -> float:
    """Cost of attention beside that of the matrices: per layer about 24·h²·n and, causal, 2·h·n² operations.

    Source: the usual count for a decoder layer (12·h² weights, two operations each).
    """
    return 1 / (12 * hidden_size)


def _assign(samples: Ids, lengths: np.ndarray, spec: PlanSpec) -> list[Ids]:
    """Split a step over the data ranks: equal counts, the first ranks take the remainder; or equal costs."""
    if not spec.balance:
        return np.array_split(samples, spec.dp_size)
    tokens = lengths[samples].astype(np.float64)
    costs = tokens + spec.attention_cost * tokens**2
    loads = [(0.0, rank) for rank in range(spec.dp_size)]
    shares: list[list[int]] = [[] for _ in loads]
    for index in np.argsort(-costs, kind="stable"):
        load, rank = loads[0]
        shares[rank].append(int(index))
        heapq.heapreplace(loads, (load + float(costs[index]), rank))
    return [samples[sorted(share)] for share in shares]


def _micro_batches(samples: Ids, lengths: np.ndarray, spec: PlanSpec) -> list[Ids]:
    """Split one rank's share of a step into forwards, by count or by tokens."""
    if spec.max_tokens is None:
        return [samples[i : i + spec.micro_batch_size] for i in range(0, len(samples), spec.micro_batch_size)]
    return [samples[sorted(chosen)] for chosen in _best_fit(lengths[samples], spec.max_tokens)]


def _best_fit(tokens: np.ndarray, capacity: int) -> list[list[int]]:
    """Best-fit decreasing: the longest first, each into the fullest forward that still holds it."""
    forwards: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (tokens left, forward), sorted
    for index in np.argsort(-tokens, kind="stable"):
        size = int(tokens[index])
        place = bisect.bisect_left(room, (size, -1))
        if place == len(room):
            forwards.append([int(index)])
            bisect.insort(room, (max(0, capacity - size), len(forwards) - 1))
        else:
            left, forward = room.pop(place)
            forwards[forward].append(int(index))
            bisect.insort(room, (left - size, forward))
    return forwards

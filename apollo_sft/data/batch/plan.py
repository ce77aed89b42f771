"""Plan the samples of every micro-batch of every data rank at a given step: pure integers, no communication.

The plan is a function of the sample lengths, the spec and the step alone. Every rank computes the same one, so the
whole data state of a run is the step, and resuming on another number of ranks needs nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from apollo_sft.data.batch.permutation import Ids, shuffled

if TYPE_CHECKING:
    from apollo_sft.data.batch.mixture import Mixture


@dataclass(frozen=True, slots=True)
class PlanSpec:
    """What a plan depends on besides the sample lengths and the step."""

    batch_size: int
    """Samples per step over all data ranks."""

    micro_batch_size: int
    """Samples per forward of one data rank."""

    dp_size: int
    seed: int
    shuffle: bool = True
    drop_last: bool = False

    max_tokens: int | None = None
    """Fill forwards by tokens instead of samples; a longer sample is a forward of its own."""

    balance: bool = False
    """Give the data ranks equal cost instead of equal numbers of samples."""

    attention_cost: float = 0.0
    """A sample of n tokens costs n + `attention_cost` * n², in tokens."""

    mixture: Mixture | None = None
    """The sources in the store and how much of each an epoch takes; None: an epoch is every sample once."""


@dataclass(frozen=True, slots=True)
class StepPlan:
    """The samples of one step, and the data rank and the forward of each."""

    epoch: int

    samples: Ids
    """The samples of the whole step, in order."""

    rank_of: np.ndarray
    """The data rank of each sample."""

    forward_of: np.ndarray
    """The forward of each sample in its data rank."""

    costs: np.ndarray
    """The cost of each sample, see `PlanSpec`."""

    dp_size: int

    @property
    def num_forwards(self) -> int:
        """Return the number of forwards that every data rank runs."""
        return int(self.forward_of.max()) + 1

    def micro_batches(self, dp_rank: int) -> list[Ids]:
        """Return the samples of each forward of this rank; a rank with fewer forwards ends with empty ones."""
        mine = np.flatnonzero(self.rank_of == dp_rank)
        forwards = self.forward_of[mine]
        return [self.samples[mine[forwards == forward]] for forward in range(self.num_forwards)]

    def imbalance(self) -> float:
        """Return the cost of the busiest data rank over that of the average one: 1.0 is even."""
        of_ranks = np.bincount(self.rank_of, self.costs, self.dp_size)
        return float(of_ranks.max() / of_ranks.mean())


def samples_per_epoch(num_samples: int, spec: PlanSpec) -> int:
    """Return the number of samples of an epoch over a store of `num_samples`."""
    if spec.mixture is None:
        return num_samples
    return spec.mixture.num_samples


def steps_per_epoch(num_samples: int, spec: PlanSpec) -> int:
    """Return the number of steps of an epoch over a store of `num_samples`."""
    full, rest = divmod(samples_per_epoch(num_samples, spec), spec.batch_size)
    if rest and not spec.drop_last:
        return full + 1
    return full


def plan(lengths: np.ndarray, spec: PlanSpec, step: int) -> StepPlan:
    """Return the plan of `step` (from 0). `lengths`: tokens of each sample, shape (samples,); may be memory-mapped."""
    epoch, index = divmod(step, steps_per_epoch(len(lengths), spec))
    in_epoch = samples_per_epoch(len(lengths), spec)
    places = np.arange(index * spec.batch_size, min((index + 1) * spec.batch_size, in_epoch))
    if spec.shuffle:
        places = shuffled(places, in_epoch, spec.seed, epoch)
    samples = places
    if spec.mixture is not None:
        samples = spec.mixture.samples(places, spec.seed, epoch)

    # Only the lengths of these samples are read from the map, not all of them.
    tokens = lengths[samples].astype(np.int64)
    costs = tokens + spec.attention_cost * tokens.astype(np.float64) ** 2
    rank_of = _even_costs(costs, spec.dp_size) if spec.balance else _even_counts(len(samples), spec.dp_size)

    if spec.max_tokens is None:
        forward_of = _place_in_rank(rank_of, np.arange(len(samples))) // spec.micro_batch_size
    else:
        forward_of = _best_fit(tokens, rank_of, spec.max_tokens)
    return StepPlan(epoch, samples, rank_of, forward_of, costs, spec.dp_size)


def attention_cost(hidden_size: int) -> float:
    """Return the cost of attention relative to the matrices: per layer about 24·h²·n and, causal, 2·h·n² operations.

    Source: the usual count for a decoder layer (12·h² weights, two operations each).
    """
    return 1 / (12 * hidden_size)


def _even_counts(num_samples: int, dp_size: int) -> np.ndarray:
    """Return the data rank of each sample of a step: neighbours together, the first ranks take the remainder."""
    each, rest = divmod(num_samples, dp_size)
    counts = np.full(dp_size, each)
    counts[:rest] += 1
    return np.repeat(np.arange(dp_size), counts)


def _even_costs(costs: np.ndarray, dp_size: int) -> np.ndarray:
    """Return the data rank of each sample of a step: the most expensive sample first, each to the rank with the least
    cost until then.

    Many samples are assigned at a time, as long as every next rank has less than each rank that has just got one.
    Source: Graham's longest processing time rule, 1969.
    """
    descending = np.argsort(-costs, kind="stable")
    rank_of = np.empty(len(costs), dtype=np.int64)
    loads = np.zeros(dp_size)
    done = 0
    while done < len(costs):
        waiting = descending[done : done + dp_size]
        ranks = np.argsort(loads, kind="stable")[: len(waiting)]
        served = loads[ranks] + costs[waiting]
        in_turn = loads[ranks][1:] < np.minimum.accumulate(served)[:-1]

        # Up to the first rank that no longer has the least: one that has just got a sample has less.
        number = len(waiting)
        if not in_turn.all():
            number = int(in_turn.argmin()) + 1
        rank_of[waiting[:number]] = ranks[:number]
        loads[ranks[:number]] = served[:number]
        done += number
    return rank_of


def _place_in_rank(rank_of: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Return how many samples of the same rank come before each sample. `order`: the samples in turn."""
    by_rank = order[np.argsort(rank_of[order], kind="stable")]
    ranks = rank_of[by_rank]
    places = np.empty(len(order), dtype=np.int64)
    places[by_rank] = np.arange(len(order)) - np.searchsorted(ranks, ranks)
    return places


def _best_fit(tokens: np.ndarray, rank_of: np.ndarray, capacity: int) -> np.ndarray:
    """Return the forward of each sample in its rank: the longest first, each into the fullest forward that has room.

    One sample of every rank at a time. Source: best fit decreasing, the rule for packing bins.
    """
    places = _place_in_rank(rank_of, np.argsort(-tokens, kind="stable"))
    forward_of = np.empty(len(tokens), dtype=np.int64)

    # room[rank, forward]: tokens that still fit in.
    room = np.empty((int(rank_of.max()) + 1, 0), dtype=np.int64)
    num_forwards = np.zeros(len(room), dtype=np.int64)
    in_turn = np.argsort(places, kind="stable")
    for samples in np.split(in_turn, np.cumsum(np.bincount(places))[:-1]):
        if num_forwards.max() == room.shape[1]:
            # A forward that is not open yet has room for nothing, so that no sample fits into it.
            room = np.pad(room, ((0, 0), (0, 1)), constant_values=-1)

        ranks = rank_of[samples]
        sizes = tokens[samples]
        left = room[ranks]
        fits = left >= sizes[:, None]
        fullest = np.where(fits, left, np.iinfo(np.int64).max).argmin(axis=1)
        opens = ~fits.any(axis=1)

        # Where no forward has room, the next one is opened: of the capacity, or as long as the sample.
        chosen = np.where(opens, num_forwards[ranks], fullest)
        before = np.where(opens, np.maximum(capacity, sizes), room[ranks, chosen])
        room[ranks, chosen] = before - sizes
        num_forwards[ranks] += opens
        forward_of[samples] = chosen
    return forward_of

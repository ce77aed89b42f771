"""Which samples every micro-batch of every data rank holds at a given step: pure integers, no communication.

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
    """`batch_size`: samples per step over all data ranks. `micro_batch_size`: samples per forward of one data rank.

    `max_tokens`: fill forwards by tokens instead; a longer sample is a forward of its own.
    `balance`: give the data ranks equal cost instead of equal numbers of samples. A sample of n tokens costs
    n + `attention_cost` * n², in tokens.
    `mixture`: the sources in the store and how much of each an epoch takes; None: an epoch is every sample once.
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
    mixture: Mixture | None = None


@dataclass(frozen=True, slots=True)
class StepPlan:
    """`samples`: ids of the whole step, in order; sample i goes into forward `forward_of[i]` of data rank `rank_of[i]`
    and costs `costs[i]`, see `PlanSpec`. Every data rank runs `num_forwards` of them.
    """

    epoch: int
    samples: Ids
    rank_of: np.ndarray
    forward_of: np.ndarray
    costs: np.ndarray
    dp_size: int

    @property
    def num_forwards(self) -> int:
        return int(self.forward_of.max()) + 1

    def micro_batches(self, dp_rank: int) -> list[Ids]:
        """Ids of each forward of this rank; a rank that has fewer samples ends with empty ones."""
        mine = np.flatnonzero(self.rank_of == dp_rank)
        return [self.samples[mine[self.forward_of[mine] == forward]] for forward in range(self.num_forwards)]

    def imbalance(self) -> float:
        """Cost of the busiest data rank over that of the average one: 1.0 is even."""
        of_ranks = np.bincount(self.rank_of, self.costs, self.dp_size)
        return float(of_ranks.max() / of_ranks.mean())


def samples_per_epoch(num_samples: int, spec: PlanSpec) -> int:
    """Of a store of `num_samples`."""
    return num_samples if spec.mixture is None else spec.mixture.num_samples


def steps_per_epoch(num_samples: int, spec: PlanSpec) -> int:
    full, rest = divmod(samples_per_epoch(num_samples, spec), spec.batch_size)
    return full + (1 if rest and not spec.drop_last else 0)


def plan(lengths: np.ndarray, spec: PlanSpec, step: int) -> StepPlan:
    """The plan of `step` (from 0). `lengths`: tokens of each sample, shape (samples,); may be memory-mapped."""
    epoch, index = divmod(step, steps_per_epoch(len(lengths), spec))
    in_epoch = samples_per_epoch(len(lengths), spec)
    places = np.arange(index * spec.batch_size, min((index + 1) * spec.batch_size, in_epoch))
    places = shuffled(places, in_epoch, spec.seed, epoch) if spec.shuffle else places
    samples = places if spec.mixture is None else spec.mixture.samples(places, spec.seed, epoch)
    tokens = lengths[samples].astype(np.int64)
    costs = tokens + spec.attention_cost * tokens.astype(np.float64) ** 2
    rank_of = _even_costs(costs, spec.dp_size) if spec.balance else _even_counts(len(samples), spec.dp_size)
    if spec.max_tokens is None:
        forward_of = _place_in_rank(rank_of, np.arange(len(samples))) // spec.micro_batch_size
    else:
        forward_of = _best_fit(tokens, rank_of, spec.max_tokens)
    return StepPlan(epoch, samples, rank_of, forward_of, costs, spec.dp_size)


def attention_cost(hidden_size: int) -> float:
    """Cost of attention beside that of the matrices: per layer about 24·h²·n and, causal, 2·h·n² operations.

    Source: the usual count for a decoder layer (12·h² weights, two operations each).
    """
    return 1 / (12 * hidden_size)


def _even_counts(num_samples: int, dp_size: int) -> np.ndarray:
    """The data rank of each sample of a step: neighbours together, the first ranks take the remainder."""
    each, rest = divmod(num_samples, dp_size)
    return np.repeat(np.arange(dp_size), [each + (rank < rest) for rank in range(dp_size)])


def _even_costs(costs: np.ndarray, dp_size: int) -> np.ndarray:
    """The same by cost: the most expensive sample first, each to the rank that has the least so far.

    Done for many samples at a time: as long as every next rank has less than each rank that was just served.
    Source: Graham's longest processing time rule, 1969.
    """
    descending = np.argsort(-costs, kind="stable")
    rank_of, loads = np.empty(len(costs), dtype=np.int64), np.zeros(dp_size)
    done = 0
    while done < len(costs):
        waiting = descending[done : done + dp_size]
        ranks = np.argsort(loads, kind="stable")[: len(waiting)]
        served = loads[ranks] + costs[waiting]
        in_turn = loads[ranks][1:] < np.minimum.accumulate(served)[:-1]
        number = len(waiting) if in_turn.all() else int(in_turn.argmin()) + 1
        rank_of[waiting[:number]] = ranks[:number]
        loads[ranks[:number]] = served[:number]
        done += number
    return rank_of


def _place_in_rank(rank_of: np.ndarray, order: np.ndarray) -> np.ndarray:
    """How many samples of the same rank come before each sample. `order`: the samples in turn."""
    by_rank = order[np.argsort(rank_of[order], kind="stable")]
    ranks = rank_of[by_rank]
    places = np.empty(len(order), dtype=np.int64)
    places[by_rank] = np.arange(len(order)) - np.searchsorted(ranks, ranks)
    return places


def _best_fit(tokens: np.ndarray, rank_of: np.ndarray, capacity: int) -> np.ndarray:
    """The forward of each sample in its rank: the longest first, each into the fullest forward that still holds it.

    One sample of every rank at a time. `room[rank, forward]`: tokens left.
    """
    places = _place_in_rank(rank_of, np.argsort(-tokens, kind="stable"))
    forward_of = np.empty(len(tokens), dtype=np.int64)
    room = np.empty((int(rank_of.max()) + 1, 0), dtype=np.int64)
    num_forwards = np.zeros(len(room), dtype=np.int64)
    in_turn = np.argsort(places, kind="stable")
    for samples in np.split(in_turn, np.cumsum(np.bincount(places))[:-1]):
        if num_forwards.max() == room.shape[1]:
            room = np.pad(room, ((0, 0), (0, 1)), constant_values=-1)
        ranks, sizes = rank_of[samples], tokens[samples]
        left = room[ranks]
        fits = left >= sizes[:, None]
        fullest = np.where(fits, left, np.iinfo(np.int64).max).argmin(axis=1)
        opens = ~fits.any(axis=1)
        chosen = np.where(opens, num_forwards[ranks], fullest)
        before = np.where(opens, np.maximum(capacity, sizes), room[ranks, chosen])
        room[ranks, chosen] = before - sizes
        num_forwards[ranks] += opens
        forward_of[samples] = chosen
    return forward_of

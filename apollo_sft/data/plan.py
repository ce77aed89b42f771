"""Which samples every micro-batch of every data rank holds at a given step: pure integers, no communication.

The plan is a function of the sample lengths, the spec and the step alone. Every rank computes the same one, so the
whole data state of a run is the step, and resuming on another number of ranks needs nothing else.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

Ids = np.ndarray
"""Sample ids, int64 of shape (samples,)."""


@dataclass(frozen=True, slots=True)
class PlanSpec:
    """`batch_size`: samples per step over all data ranks. `micro_batch_size`: samples per forward of one data rank."""

    batch_size: int
    micro_batch_size: int
    dp_size: int
    seed: int
    shuffle: bool = True
    drop_last: bool = False


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
    per_rank = [_micro_batches(ids, spec) for ids in _assign(samples, spec)]
    num_forwards = max(1, *(len(forwards) for forwards in per_rank))
    empty = np.empty(0, dtype=np.int64)
    padded = (forwards + [empty] * (num_forwards - len(forwards)) for forwards in per_rank)
    return StepPlan(epoch, samples, tuple(tuple(forwards) for forwards in padded))


@lru_cache(maxsize=2)
def _epoch_order(num_samples: int, seed: int, epoch: int) -> Ids:
    return np.random.Generator(np.random.Philox([seed, epoch])).permutation(num_samples)


def _assign(samples: Ids, spec: PlanSpec) -> list[Ids]:
    """Split a step over the data ranks: equal counts, the first ranks take the remainder."""
    return np.array_split(samples, spec.dp_size)


def _micro_batches(samples: Ids, spec: PlanSpec) -> list[Ids]:
    """Split one rank's share of a step into forwards."""
    return [samples[i : i + spec.micro_batch_size] for i in range(0, len(samples), spec.micro_batch_size)]

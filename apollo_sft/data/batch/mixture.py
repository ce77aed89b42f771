"""Mix several sources of samples in one store: how many of each an epoch takes, and which. Pure integers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise

import numpy as np

from apollo_sft.data.batch.permutation import Ids, pass_keys, permuted
from apollo_sft.errors import DataError


@dataclass(frozen=True, slots=True)
class Mixture:
    """Sources that follow one another in the store.

    A source of which an epoch takes another number than it has is read pass by pass, each pass in an order of its own,
    and every epoch continues where the one before it stopped. At any time every sample of a source has therefore been
    taken equally often, but for one.
    """

    names: tuple[str, ...]

    sizes: tuple[int, ...]
    """Samples of each source."""

    takes: tuple[int, ...]
    """Samples that an epoch takes of each source."""

    @property
    def num_samples(self) -> int:
        """Return the number of samples of an epoch."""
        return sum(self.takes)

    @property
    def is_plain(self) -> bool:
        """Return whether an epoch is every sample once."""
        return self.takes == self.sizes

    def samples(self, places: np.ndarray, seed: int, epoch: int) -> Ids:
        """Return the samples at these places of an epoch, in which the sources follow one another."""
        takes = np.array(self.takes)
        ends = np.cumsum(self.takes)
        source = np.searchsorted(ends, places, side="right")
        within = places - (ends - takes)[source]

        starts = np.cumsum(self.sizes) - self.sizes
        found: Ids = starts[source] + within
        for number, (size, take) in enumerate(zip(self.sizes, self.takes, strict=True)):
            mine = np.flatnonzero(source == number)
            if take == size or not len(mine):
                continue
            # Counted over all epochs, so that a pass continues in the next epoch.
            passes, at = np.divmod(epoch * take + within[mine], size)
            found[mine] = starts[number] + permuted(at, size, pass_keys(seed, number, passes))
        return found

    def source_of(self, samples: Ids) -> np.ndarray:
        """Return the number of each sample's source, int64 of the same shape."""
        return np.searchsorted(np.cumsum(self.sizes), samples, side="right")

    def by_name(self, values: np.ndarray, samples: Ids) -> dict[str, int]:
        """Return the sum of `values` over the samples of each source. `values[i]` is that of `samples[i]`."""
        totals = np.zeros(len(self.sizes), dtype=np.int64)
        np.add.at(totals, self.source_of(samples), values)
        return dict(zip(self.names, totals.tolist(), strict=True))

    def in_store(self, values: np.ndarray) -> dict[str, int]:
        """Return the sum of `values` over the samples of each source. `values` has one for each sample of the store."""
        edges = np.cumsum([0, *self.sizes])
        found = [int(values[first:end].sum(dtype=np.int64)) for first, end in pairwise(edges)]
        return dict(zip(self.names, found, strict=True))


def shares(weights: Sequence[float], total: int) -> list[int]:
    """Divide `total` by weights, in whole numbers that add up to it. Source: the method of the largest remainder.

    Of equal remainders the first is rounded up first. Weights are taken as they are written in decimals.
    """
    # Fractions of the decimal text: 0.1 as a float is not a tenth, and rounding would depend on it.
    exact = [Fraction(str(weight)) for weight in weights]
    quotas = [total * weight / sum(exact) for weight in exact]
    found = [int(quota) for quota in quotas]

    by_remainder = sorted(range(len(found)), key=lambda i: found[i] - quotas[i])
    for i in by_remainder[: total - sum(found)]:
        found[i] += 1
    return found


@dataclass(frozen=True, slots=True)
class Part:
    """The part of a source in an epoch: without weight and number, each of its samples once."""

    name: str

    weight: float | None = None
    """Relative to the weights of other sources."""

    max_samples: int | None = None
    """The number of samples."""


def mixture(parts: Sequence[Part], sizes: Sequence[int], key: str) -> Mixture:
    """Return how many samples of each source an epoch takes.

    Sources with weights give together as many samples as they have together.
    Raises: DataError, naming `key`, for a source without samples, with fewer than an epoch takes, or with a weight too
    small for one sample.
    """
    takes = list(sizes)
    for number, part in enumerate(parts):
        if part.max_samples is not None:
            takes[number] = part.max_samples

    weighted = [number for number, part in enumerate(parts) if part.weight is not None]
    weights = [float(parts[number].weight or 0) for number in weighted]
    divided = shares(weights, sum(sizes[number] for number in weighted))
    for number, take in zip(weighted, divided, strict=True):
        takes[number] = take

    # All problems in one error: the user corrects them in one go.
    found = [_problem(part, size, take, key) for part, size, take in zip(parts, sizes, takes, strict=True)]
    problems = [str(problem) for problem in found if problem is not None]
    if problems:
        raise DataError("\n".join(problems))
    return Mixture(tuple(part.name for part in parts), tuple(sizes), tuple(takes))


def _problem(part: Part, size: int, take: int, key: str) -> DataError | None:
    if not size:
        return DataError(f"{key}: the source {part.name} has no sample to train on", fix="leave it out")
    if take > size and part.weight is None:
        return DataError(
            f"{key}: the source {part.name} has fewer samples than its max_samples",
            found=f"{size:,} samples, max_samples {take:,}",
            fix=f"max_samples:{size}, or leave it out; a weight repeats samples",
        )
    if not take:
        return DataError(
            f"{key}: the weight of the source {part.name} is too small for one sample in an epoch",
            found=f"weight {part.weight}",
            fix="a larger weight, or leave the source out",
        )
    return None

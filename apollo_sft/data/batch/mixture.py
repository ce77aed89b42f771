"""Several sources of samples in one store: how many of each an epoch takes, and which. Pure integers."""

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
    """The sources lie in the store one after the other. `sizes`: samples of each; `takes`: as many an epoch has of it.

    A source of which an epoch takes another number than it has is gone through pass by pass, each pass in an order of
    its own, and every epoch goes on where the one before it stopped. So at any time every sample of a source has been
    taken equally often, but for one.
    """

    names: tuple[str, ...]
    sizes: tuple[int, ...]
    takes: tuple[int, ...]

    @property
    def num_samples(self) -> int:
        """Of an epoch."""
        return sum(self.takes)

    @property
    def is_plain(self) -> bool:
        """Whether an epoch is every sample once."""
        return self.takes == self.sizes

    def samples(self, places: np.ndarray, seed: int, epoch: int) -> Ids:
        """The samples at these places of an epoch, in which the sources stand one after the other."""
        takes, ends = np.array(self.takes), np.cumsum(self.takes)
        source = np.searchsorted(ends, places, side="right")
        within = places - (ends - takes)[source]
        starts = np.cumsum(self.sizes) - self.sizes
        found: Ids = starts[source] + within
        for number, (size, take) in enumerate(zip(self.sizes, self.takes, strict=True)):
            mine = np.flatnonzero(source == number)
            if take == size or not len(mine):
                continue
            passes, at = np.divmod(epoch * take + within[mine], size)
            found[mine] = starts[number] + permuted(at, size, pass_keys(seed, number, passes))
        return found

    def source_of(self, samples: Ids) -> np.ndarray:
        """The number of each sample's source, int64 of the same shape."""
        return np.searchsorted(np.cumsum(self.sizes), samples, side="right")

    def by_name(self, values: np.ndarray, samples: Ids) -> dict[str, int]:
        """What `values` of these samples come to in each source."""
        totals = np.zeros(len(self.sizes), dtype=np.int64)
        np.add.at(totals, self.source_of(samples), values)
        return dict(zip(self.names, totals.tolist(), strict=True))

    def in_store(self, values: np.ndarray) -> dict[str, int]:
        """What `values` of all samples of the store come to in each source."""
        found = [int(values[first:end].sum(dtype=np.int64)) for first, end in pairwise(np.cumsum([0, *self.sizes]))]
        return dict(zip(self.names, found, strict=True))


def shares(weights: Sequence[float], total: int) -> list[int]:
    """`total` divided by weights, in whole numbers that add up to it. Source: the method of the largest remainder.

    Equal remainders: the first comes first. Weights are taken as they are written in decimals.
    """
    exact = [Fraction(str(weight)) for weight in weights]
    quotas = [total * weight / sum(exact) for weight in exact]
    found = [int(quota) for quota in quotas]
    by_remainder = sorted(range(len(found)), key=lambda i: found[i] - quotas[i])
    for i in by_remainder[: total - sum(found)]:
        found[i] += 1
    return found


@dataclass(frozen=True, slots=True)
class Part:
    """What is asked of a source: `weight` or `max_samples`, or, without either, each of its samples once an epoch."""

    name: str
    weight: float | None = None
    max_samples: int | None = None


def mixture(parts: Sequence[Part], sizes: Sequence[int], key: str) -> Mixture:
    """How many samples of each source an epoch takes. Those with weights take together as many as they have together.

    Raises: DataError, naming `key`, for a source without samples, with fewer than it shall give, or too light for one.
    """
    weighted = [number for number, part in enumerate(parts) if part.weight is not None]
    divided = shares([float(parts[n].weight or 0) for n in weighted], sum(sizes[n] for n in weighted))
    takes = [size if part.max_samples is None else part.max_samples for part, size in zip(parts, sizes, strict=True)]
    for number, take in zip(weighted, divided, strict=True):
        takes[number] = take
    problems = [
        str(problem)
        for part, size, take in zip(parts, sizes, takes, strict=True)
        if (problem := _problem(part, size, take, key)) is not None
    ]
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
            f"{key}: the weight of the source {part.name} gives it no sample of an epoch",
            found=f"weight {part.weight}",
            fix="a larger weight, or leave the source out",
        )
    return None

"""Compute pseudo-random orders of a number of samples, at any place without the other places."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

Ids = np.ndarray
"""Sample ids, int64 of shape (samples,)."""

LARGEST_PERMUTATION = 2**20
"""Epochs of more samples are not shuffled as a list: the sample at each place is computed when it is needed."""

ROUNDS = 8
"""Rounds of the Feistel network."""

GOLDEN = 0x9E3779B97F4A7C15


def shuffled(places: np.ndarray, num_samples: int, seed: int, epoch: int) -> Ids:
    """Return the samples at these places of the epoch's order."""
    if num_samples <= LARGEST_PERMUTATION:
        order: Ids = _epoch_order(num_samples, seed, epoch)[places]
        return order

    return permuted(places, num_samples, _generator(seed, epoch).integers(2**32, size=(ROUNDS, 1), dtype=np.uint64))


def pass_keys(seed: int, number: int, passes: np.ndarray) -> np.ndarray:
    """Return keys for `permuted`, of shape (ROUNDS, places): each pass over source `number` of a mixture has an order
    of its own. `passes`: the pass of each place, from 0.
    """
    first = _generator(seed, number, 1).integers(2**64, size=(ROUNDS, 1), dtype=np.uint64)
    keys: np.ndarray = _mixed(first + np.uint64(GOLDEN) * passes.astype(np.uint64)) >> np.uint64(32)
    return keys


def permuted(places: np.ndarray, num_samples: int, keys: np.ndarray) -> Ids:
    """Return a pseudo-random permutation of range(num_samples) at these places, without the other places.

    `keys`: uint64 of shape (ROUNDS, 1), or (ROUNDS, places) where each place belongs to a permutation of its own.

    Source: a Feistel network on the bits of the place, applied again while the result is no sample (cycle walking:
    Black and Rogaway, "Ciphers with arbitrary finite domains", 2002).
    """
    bits = (num_samples - 1).bit_length()
    low = np.uint64(bits // 2)
    high = np.uint64(bits - bits // 2)

    # The network permutes 2^bits values, fewer than twice as many as there are samples.
    values = places.astype(np.uint64)
    outside = np.arange(len(values))
    while len(outside):
        walking = values[outside]
        left = walking >> low
        right = walking & _ones(low)
        mine = keys if keys.shape[1] == 1 else keys[:, outside]

        for first, second in zip(mine[::2], mine[1::2], strict=True):
            left ^= _mixed(right ^ first) & _ones(high)
            right ^= _mixed(left ^ second) & _ones(low)

        values[outside] = (left << low) | right
        outside = outside[values[outside] >= num_samples]
    return values.astype(np.int64)


@lru_cache(maxsize=2)
def _epoch_order(num_samples: int, seed: int, epoch: int) -> Ids:
    return _generator(seed, epoch).permutation(num_samples)


def _generator(*key: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(list(key)))


def _ones(bits: np.uint64) -> np.uint64:
    return np.uint64((1 << int(bits)) - 1)


def _mixed(values: np.ndarray) -> np.ndarray:
    """Mix values: every bit of the result depends on every bit of the value. Source: the finaliser of SplitMix64."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: np.ndarray = values ^ (values >> np.uint64(31))
    return mixed

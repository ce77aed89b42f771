"""Seeded samples in a real store: conversations of random tokens with a few or no targets each."""

from pathlib import Path

import numpy as np

from apollo_sft.data.store.store_files import SampleStore, StoreSummary, StoreWriter
from apollo_sft.types import IGNORE_INDEX, RowRef, Sample


def random_samples(number: int, vocab_size: int = 97, most_targets: int = 30, seed: int = 0) -> list[Sample]:
    """Samples of 2 to 50 tokens; targets stand at the end, and every fifth sample has none."""
    rng = np.random.default_rng(seed)
    samples = []
    for row in range(number):
        targets = 0 if row % 5 == 0 else int(rng.integers(1, most_targets + 1))
        samples.append(_sample(rng, vocab_size, targets, row))
    return samples


def _sample(rng: np.random.Generator, vocab_size: int, targets: int, row: int) -> Sample:
    tokens = int(rng.integers(2, 20)) + targets
    ids = rng.integers(0, vocab_size, tokens).astype(np.int32)
    labels = np.full(tokens, IGNORE_INDEX, np.int32)
    labels[tokens - 1 - targets : tokens - 1] = ids[tokens - targets :]
    return Sample(ids, labels, RowRef("rows", row), (1,))


def graded_samples(number: int, most_targets: int, vocab_size: int = 97, seed: int = 0) -> list[Sample]:
    """Samples whose numbers of targets are spread evenly over 0 to `most_targets`, in random order."""
    rng = np.random.default_rng(seed)
    targets = rng.permutation(np.linspace(0, most_targets, number).round().astype(int)).tolist()
    return [_sample(rng, vocab_size, count, row) for row, count in enumerate(targets)]


def write_store(folder: Path, samples: list[Sample]) -> SampleStore:
    folder.mkdir(parents=True, exist_ok=True)
    writer = StoreWriter(folder, ["rows"])
    for sample in samples:
        writer.add(sample)
    summary = StoreSummary(files=["rows"], num_rows=len(samples), num_samples=len(samples))
    summary.num_tokens = sum(len(sample.input_ids) for sample in samples)
    summary.num_targets = sum(sample.num_targets for sample in samples)
    writer.finish("test", summary)
    return SampleStore(folder)

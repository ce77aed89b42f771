"""Samples -> one packed micro-batch: documents side by side in one row, no padding between them."""

from collections.abc import Sequence

import numpy as np
import torch

from apollo_sft.types import IGNORE_INDEX, MicroBatch, Sample

PAD_TOKEN_ID = 0
"""What stands in a document that is never trained: its labels are ignored and no other document sees it."""


def pack(samples: Sequence[Sample], multiple: int = 1) -> MicroBatch:
    """Pack samples into one row of at least one token whose length is a multiple of `multiple`.

    What is added to reach that length is a document of its own, with ignored labels. No sample at all gives a row of
    padding only, which still runs the whole model: all ranks then take part in the same collectives.
    """
    lengths = [len(sample.input_ids) for sample in samples]
    total = sum(lengths)
    padding = max(-total % multiple, 0) if total else multiple
    if padding:
        lengths.append(padding)
    input_ids = np.full(total + padding, PAD_TOKEN_ID, dtype=np.int64)
    labels = np.full(total + padding, IGNORE_INDEX, dtype=np.int64)
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    for sample, start in zip(samples, starts, strict=False):
        input_ids[start : start + len(sample.input_ids)] = sample.input_ids
        labels[start : start + len(sample.labels)] = sample.labels
    position_ids = np.arange(total + padding) - np.repeat(starts[:-1], lengths)
    return MicroBatch(
        input_ids=torch.from_numpy(input_ids)[None],
        labels=torch.from_numpy(labels)[None],
        position_ids=torch.from_numpy(position_ids)[None],
        document_starts=torch.from_numpy(starts),
        num_targets=int((labels != IGNORE_INDEX).sum()),
    )

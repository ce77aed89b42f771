"""Read and pack the batches of one data rank, one step ahead of the training loop."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from apollo_sft.data.batch.plan import PlanSpec, plan, steps_per_epoch
from apollo_sft.data.store.open import SampleStore
from apollo_sft.types import IGNORE_INDEX, MicroBatch, RowRef, Sample

PAD_TOKEN_ID = 0
"""The token of a document that is never trained: its labels are ignored and no other document sees it."""


@dataclass(frozen=True, slots=True)
class StepBatch:
    """One step of one data rank, with the counts of the whole step over all data ranks."""

    step: int
    epoch: int
    micro_batches: list[MicroBatch]

    rows: list[list[RowRef]]
    """The rows of each micro-batch."""

    num_samples: int
    num_targets: int
    num_tokens: int

    lengths: Sequence[int] | np.ndarray = ()
    """Tokens of each sample of the whole step."""

    sources: Mapping[str, int] = field(default_factory=dict)
    """The targets of each source, by its name; empty where there is only one."""


class Loader:
    """Makes the batches of `dp_rank` from the store, in the order of the plan. `multiple`: see `pack`.

    `spec.mixture` names the sources whose targets and documents are counted separately, if there are several.
    `pinned`: in memory from which a GPU copies while the host continues.
    """

    def __init__(
        self, store: SampleStore, spec: PlanSpec, dp_rank: int, multiple: int = 1, pinned: bool = False
    ) -> None:
        self.store = store
        self.spec = spec
        self.dp_rank = dp_rank
        self.multiple = multiple
        self.pinned = pinned
        self.mixture = None
        if spec.mixture is not None and len(spec.mixture.names) > 1:
            self.mixture = spec.mixture

    @property
    def steps_per_epoch(self) -> int:
        """Return the number of steps of an epoch."""
        return steps_per_epoch(len(self.store), self.spec)

    def batch(self, step: int) -> StepBatch:
        """Return the batch of one step."""
        planned = plan(self.store.lengths, self.spec, step)
        mine = planned.micro_batches(self.dp_rank)
        lengths = self.store.lengths[planned.samples]
        targets = self.store.num_targets[planned.samples]
        sources: Mapping[str, int] = {}
        if self.mixture is not None:
            sources = self.mixture.by_name(targets, planned.samples)

        # The counts are those of all ranks: every rank divides its loss by the targets of the whole step.
        return StepBatch(
            step=step,
            epoch=planned.epoch,
            micro_batches=[self._micro_batch(ids) for ids in mine],
            rows=[self._rows(ids) for ids in mine],
            num_samples=len(planned.samples),
            num_targets=int(targets.sum(dtype=np.int64)),
            num_tokens=int(lengths.sum(dtype=np.int64)),
            lengths=lengths,
            sources=sources,
        )

    def batches(self, steps: Iterable[int]) -> Iterator[StepBatch]:
        """Yield the batches of `steps`, in order. While one is trained on, a thread makes the next."""
        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="loader") as pool:
            ahead: Future[StepBatch] | None = None
            for step in steps:
                following = pool.submit(self.batch, step)
                if ahead is not None:
                    yield ahead.result()
                ahead = following

            if ahead is not None:
                yield ahead.result()

    def _rows(self, ids: np.ndarray) -> list[RowRef]:
        return [self.store.ref(int(i)) for i in ids]

    def _micro_batch(self, ids: np.ndarray) -> MicroBatch:
        packed = pack([self.store[int(i)] for i in ids], self.multiple)
        if self.mixture is not None:
            packed = replace(packed, sources=torch.from_numpy(self.mixture.source_of(ids)))
        if not self.pinned:
            return packed
        return _pinned(packed)


def _pinned(batch: MicroBatch) -> MicroBatch:
    return replace(
        batch,
        input_ids=batch.input_ids.pin_memory(),
        labels=batch.labels.pin_memory(),
        position_ids=batch.position_ids.pin_memory(),
        document_starts=batch.document_starts.pin_memory(),
        sources=None if batch.sources is None else batch.sources.pin_memory(),
    )


def pack(samples: Sequence[Sample], multiple: int = 1) -> MicroBatch:
    """Return samples packed into one row of at least one token whose length is a multiple of `multiple`.

    The padding to that length is a document of its own, with ignored labels. No sample at all gives a row of padding
    only, which still runs the whole model: all ranks then take part in the same collectives.
    """
    lengths = [len(sample.input_ids) for sample in samples]
    total = sum(lengths)
    padding = -total % multiple
    if not total:
        padding = multiple
    if padding:
        lengths.append(padding)

    input_ids = np.full(total + padding, PAD_TOKEN_ID, dtype=np.int64)
    labels = np.full(total + padding, IGNORE_INDEX, dtype=np.int64)
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    # One start more than there are samples: that of the padding, or the end.
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

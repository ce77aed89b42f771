"""The batches of one data rank, read and packed one step ahead of the training loop."""

from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from apollo_sft.data.pack import pack
from apollo_sft.data.plan import PlanSpec, plan
from apollo_sft.data.store import SampleStore
from apollo_sft.types import MicroBatch, RowRef


@dataclass(frozen=True, slots=True)
class StepBatch:
    """One step of one data rank, with the counts of the whole step over all data ranks.

    `rows[i]` are the rows of `micro_batches[i]`.
    """

    step: int
    epoch: int
    micro_batches: list[MicroBatch]
    rows: list[list[RowRef]]
    num_samples: int
    num_targets: int
    num_tokens: int


class Loader:
    """Makes the batches of `dp_rank` from the store as the plan says. `multiple`: see `pack`."""

    def __init__(self, store: SampleStore, spec: PlanSpec, dp_rank: int, multiple: int = 1) -> None:
        self.store = store
        self.spec = spec
        self.dp_rank = dp_rank
        self.multiple = multiple

    def batch(self, step: int) -> StepBatch:
        planned = plan(self.store.lengths, self.spec, step)
        mine = planned.micro_batches[self.dp_rank]
        return StepBatch(
            step=step,
            epoch=planned.epoch,
            micro_batches=[pack([self.store[int(i)] for i in ids], self.multiple) for ids in mine],
            rows=[[self.store.ref(int(i)) for i in ids] for ids in mine],
            num_samples=len(planned.samples),
            num_targets=int(self.store.num_targets[planned.samples].sum(dtype=np.int64)),
            num_tokens=int(self.store.lengths[planned.samples].sum(dtype=np.int64)),
        )

    def batches(self, steps: Iterable[int]) -> Iterator[StepBatch]:
        """The batches of `steps`, in order. While one is trained on, the next is made in a thread."""
        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="loader") as pool:
            ahead: Future[StepBatch] | None = None
            for step in steps:
                following = pool.submit(self.batch, step)
                if ahead is not None:
                    yield ahead.result()
                ahead = following
            if ahead is not None:
                yield ahead.result()

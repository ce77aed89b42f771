"""The trace of some steps, by torch's profiler. Loaded only where `trainer.profile_steps` is set."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from apollo_sft.data.batch.loader import StepBatch
from apollo_sft.report.log import say


@dataclass(frozen=True, slots=True)
class Profile:
    """Steps that torch's profiler records, with the validations and saves between them.

    The trace is written when the last one is done, or when the run ends before it.
    """

    first: int
    """The first step, from 1."""

    last: int
    """The last step."""

    folder: Path
    """Where the trace is written."""

    def batches(self, batches: Iterable[StepBatch]) -> Iterator[StepBatch]:
        """Yield the same batches. Recording ends when the batch after the last step is requested."""
        profiler: Any = None
        done = 0
        try:
            for batch in batches:
                step = batch.step + 1
                if profiler is None and self.first <= step <= self.last:
                    profiler = torch.profiler.profile(record_shapes=True)
                    profiler.start()

                with self._named(profiler, step):
                    yield batch

                done = step
                if profiler is not None and step == self.last:
                    break
            else:
                return
        finally:
            # Also when the loop stops before the last step: what was recorded is written.
            if profiler is not None:
                self._write(profiler, done)

        yield from batches

    def _named(self, profiler: Any, step: int) -> AbstractContextManager[Any]:
        """Return a block of the trace with the step's number; nothing is recorded without a profiler."""
        if profiler is None:
            return nullcontext()
        return torch.profiler.record_function(f"step {step}")

    def _write(self, profiler: Any, done: int) -> None:
        profiler.stop()
        self.folder.mkdir(exist_ok=True)
        path = self.folder / f"steps_{self.first}-{done}.json.gz"
        profiler.export_chrome_trace(str(path))
        say(f"profile of steps {self.first} to {done}: {path}, for https://ui.perfetto.dev")

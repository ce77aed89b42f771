"""What a step took: its rate, the loop's wait for data, and the share of the processors' peak that the model used."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from apollo_sft.checkpoint.run_folder.folder import RunFolder
from apollo_sft.config.schema import SftConfig
from apollo_sft.data.batch.loader import StepBatch
from apollo_sft.parallel.launch import World
from apollo_sft.report.log import say
from apollo_sft.report.metrics import Record, StepFacts, source_record, train_record
from apollo_sft.train.precision import resolve_precision
from apollo_sft.train.step import StepResult

if TYPE_CHECKING:
    from apollo_sft.model.flops import Cost

BF16_PEAKS = {
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10G": None,
    "A10": 125e12,
}
"""Dense bf16 products with float32 sums, in operations a second, by words of the device's name, the first that fit.

Source: NVIDIA's data sheets of these products; where they count sparsity, half of the figure. None: two are published.
"""


def known_peak(device_name: str) -> float | None:
    """In operations a second with bf16; None for a device that the table does not hold."""
    words = device_name.replace("-", " ").split()
    for name, peak in BF16_PEAKS.items():
        if all(word in words for word in name.split()):
            return peak
    return None


@dataclass(frozen=True, slots=True)
class Profile:
    """Steps `first` to `last`, from 1, that torch's profiler records, with the validations and saves between them.

    The trace is written to `folder` when the last one is done, or when the run ends before it.
    """

    first: int
    last: int
    folder: Path

    def batches(self, batches: Iterable[StepBatch]) -> Iterator[StepBatch]:
        """The same batches, recorded from when the first one is handed over until one after the last is asked for."""
        profiler: Any = None
        done = 0
        try:
            for batch in batches:
                step = batch.step + 1
                if profiler is None and self.first <= step <= self.last:
                    profiler = torch.profiler.profile(record_shapes=True)
                    profiler.start()
                with nullcontext() if profiler is None else torch.profiler.record_function(f"step {step}"):
                    yield batch
                done = step
                if profiler is not None and step == self.last:
                    break
            else:
                return
        finally:
            if profiler is not None:
                self._write(profiler, done)
        yield from batches

    def _write(self, profiler: Any, done: int) -> None:
        profiler.stop()
        self.folder.mkdir(exist_ok=True)
        path = self.folder / f"steps_{self.first}-{done}.json.gz"
        profiler.export_chrome_trace(str(path))
        say(f"profile of steps {self.first} to {done}: {path}, for https://ui.perfetto.dev")


class Meter:
    """Measures the steps of a loop, on each rank; what rank 0 measures is logged.

    `cost`: of a token; `peak`: operations a second of all ranks. Without one of them no utilization is given.
    """

    def __init__(
        self,
        steps_per_epoch: int,
        cost: Cost | None = None,
        peak: float | None = None,
        profile: Profile | None = None,
    ) -> None:
        self._steps_per_epoch = steps_per_epoch
        self._cost = cost
        self._peak = peak
        self._profile = profile
        self._began = self._received = 0.0

    def batches(self, batches: Iterable[StepBatch]) -> Iterator[StepBatch]:
        """The same batches; a step begins when its batch is asked for. Writing a profile belongs to no step."""
        timed = self._timed(iter(batches))
        return timed if self._profile is None else self._profile.batches(timed)

    def _timed(self, waiting: Iterator[StepBatch]) -> Iterator[StepBatch]:
        while True:
            self._began = time.perf_counter()
            batch = next(waiting, None)
            self._received = time.perf_counter()
            if batch is None:
                return
            yield batch

    def record(self, batch: StepBatch, result: StepResult, lr: float) -> Record:
        """The metrics of the step that has just been made of `batch`."""
        seconds = time.perf_counter() - self._began
        facts = train_record(
            StepFacts(
                step=batch.step + 1,
                loss=result.loss,
                grad_norm=result.grad_norm,
                lr=lr,
                targets=batch.num_targets,
                tokens=batch.num_tokens,
                step_seconds=seconds,
                epoch=(batch.step + 1) / self._steps_per_epoch,
                peak_bytes=result.peak_bytes,
                data_wait_seconds=self._received - self._began,
                mfu=self._utilization(batch, seconds),
            )
        )
        return facts | source_record("train", result.source_sums, batch.sources)

    def _utilization(self, batch: StepBatch, seconds: float) -> float | None:
        if self._cost is None or self._peak is None:
            return None
        return self._cost.of(batch.lengths, batch.num_targets) / (seconds * self._peak)


def meter_of(config: SftConfig, causal_lm: Any, world: World, steps_per_epoch: int, folder: RunFolder | None) -> Meter:
    """`causal_lm`: live, or on meta. `folder`: None off rank 0.

    The peak is `trainer.peak_tflops`, else that of a known GPU, with bf16 forwards.
    """
    on_cuda = world.device.type == "cuda"
    peak = None if config.trainer.peak_tflops is None else config.trainer.peak_tflops * 1e12
    if peak is None and on_cuda and resolve_precision(config.model, on_cuda).compute == torch.bfloat16:
        peak = known_peak(torch.cuda.get_device_name(world.device))
    profile = None
    if config.trainer.profile_steps and folder is not None:
        first, last = config.trainer.profile_steps
        profile = Profile(first, last, folder.root / "profile")
    if peak is None or not world.is_main:
        return Meter(steps_per_epoch, profile=profile)
    from apollo_sft.model.flops import cost_of

    return Meter(steps_per_epoch, cost_of(causal_lm), peak * world.size, profile)

"""What a step took: its rate, the loop's wait for data, and the share of the processors' peak that the model used."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch

from apollo_sft.checkpoint.run_folder.folder import RunFolder
from apollo_sft.config.schema import ModelConfig, TrainerConfig
from apollo_sft.data.batch.loader import StepBatch
from apollo_sft.parallel.launch import World
from apollo_sft.report.metrics import Record, StepFacts, source_record, train_record
from apollo_sft.train.precision import resolve_precision
from apollo_sft.train.step import StepResult

if TYPE_CHECKING:
    from apollo_sft.model.flops import Cost
    from apollo_sft.train.step_profile import Profile


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
        self._began = 0.0
        self._received = 0.0

    def batches(self, batches: Iterable[StepBatch]) -> Iterator[StepBatch]:
        """Return the same batches, with the time when each is requested: there its step begins."""
        timed = self._timed(iter(batches))
        if self._profile is None:
            return timed
        return self._profile.batches(timed)  # around the clock: writing a profile belongs to no step

    def _timed(self, waiting: Iterator[StepBatch]) -> Iterator[StepBatch]:
        while True:
            self._began = time.perf_counter()
            batch = next(waiting, None)
            self._received = time.perf_counter()
            if batch is None:
                return
            yield batch

    def record(self, batch: StepBatch, result: StepResult, lr: float) -> Record:
        """Return the metrics of the step that has just been made of `batch`."""
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


def meter_of(
    trainer: TrainerConfig,
    model: ModelConfig,
    causal_lm: Any,
    world: World,
    steps_per_epoch: int,
    folder: RunFolder | None,
) -> Meter:
    """Build the meter of a run. `causal_lm`: live, or on meta. `folder`: None off rank 0.

    The peak is `trainer.peak_tflops`, else that of a known GPU, with bf16 forwards.
    """
    profile = None
    if trainer.profile_steps and folder is not None:
        from apollo_sft.train.step_profile import Profile

        first, last = trainer.profile_steps
        profile = Profile(first, last, folder.root / "profile")

    peak = _peak(trainer, model, world.device)
    if peak is None or not world.is_main:
        return Meter(steps_per_epoch, profile=profile)
    from apollo_sft.model.flops import cost_of

    return Meter(steps_per_epoch, cost_of(causal_lm), peak * world.size, profile)


def _peak(trainer: TrainerConfig, model: ModelConfig, device: torch.device) -> float | None:
    """Return the operations a second of one processor; None where nothing states them."""
    if trainer.peak_tflops is not None:
        return trainer.peak_tflops * 1e12
    if device.type != "cuda" or resolve_precision(model, on_cuda=True).compute != torch.bfloat16:
        return None
    from apollo_sft.train.gpu_peaks import known_peak

    return known_peak(torch.cuda.get_device_name(device))

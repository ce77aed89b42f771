"""The state of a training, from its first step to its last."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch.optim import Optimizer

from apollo_sft.config.schema import SftConfig
from apollo_sft.data.batch.loader import Loader
from apollo_sft.model.sft_model import SftModel
from apollo_sft.parallel.launch import World
from apollo_sft.train.checkpoints import Checkpoints
from apollo_sft.train.meter import Meter
from apollo_sft.train.optim.build import Schedule
from apollo_sft.train.reporter import Reporter

if TYPE_CHECKING:
    from apollo_sft.train.generations import Generations


@dataclass(frozen=True, slots=True)
class Run:
    """All that the loop uses."""

    world: World
    model: SftModel
    optimizer: Optimizer
    schedule: Schedule
    train: Loader
    val: Loader | None
    config: SftConfig
    checkpoints: Checkpoints
    reporter: Reporter
    step_ended: Callable[[], object]
    meter: Meter
    generations: Generations | None

    def validates_after(self, step: int) -> bool:
        """Return whether validation follows step `step` (from 0)."""
        if self.val is None:
            return False
        every = self.config.trainer.test_freq
        if every == -1:
            every = self.train.steps_per_epoch
        return (step + 1) % every == 0 or step + 1 == self.schedule.total_steps

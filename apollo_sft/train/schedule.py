"""The learning rate of every step as a closed form of the step number."""

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Schedule:
    """Linear warm-up, then `cosine` (to the end) or `wsd` (stable, then a half cosine), down to `peak * min_ratio`.

    `total_steps` are the optimizer steps that will really run; the end value is reached after the last of them.
    `stable_ratio` is the share of the steps after warm-up that `wsd` keeps at the peak.
    """

    kind: Literal["cosine", "wsd"]
    peak: float
    total_steps: int
    warmup_steps: int
    min_ratio: float
    stable_ratio: float

    def rate(self, step: int) -> float:
        """The learning rate that step `step` (from 0) uses. Above 0 from the first step on."""
        if step < self.warmup_steps:
            return self.peak * (step + 1) / self.warmup_steps
        after = self.total_steps - self.warmup_steps
        stable = int(after * self.stable_ratio) if self.kind == "wsd" else 0
        progress = max(0, step - self.warmup_steps - stable) / max(1, after - stable)
        cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
        return self.peak * (self.min_ratio + (1 - self.min_ratio) * cosine)


def warmup_steps(total_steps: int, steps: int, ratio: float) -> int:
    """`steps` when it is given (0 or more), else that share of the run; never more than the run has."""
    return min(total_steps, steps if steps >= 0 else int(total_steps * ratio))

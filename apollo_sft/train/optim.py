"""The optimizer, AdamW with weight decay on matrices only, and the learning rate of every step in closed form."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn
from torch.optim import AdamW

from apollo_sft.config.schema import OptimConfig


def build_optimizer(
    parameters: Iterable[nn.Parameter], optim: OptimConfig, num_dims: Callable[[nn.Parameter], int] = Tensor.dim
) -> AdamW:
    """AdamW over what is trainable. Norm gains and biases (fewer than two dims) are not decayed.

    `num_dims`: of a whole parameter, where its shard has others. The learning rate is set before every step, see
    `schedule`.
    """
    trainable = [parameter for parameter in parameters if parameter.requires_grad]
    groups = [
        {"params": [p for p in trainable if num_dims(p) >= 2], "weight_decay": optim.weight_decay},
        {"params": [p for p in trainable if num_dims(p) < 2], "weight_decay": 0.0},
    ]
    beta1, beta2 = optim.betas
    return AdamW([group for group in groups if group["params"]], lr=optim.lr, betas=(beta1, beta2), fused=True)


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

"""The optimizers, with weight decay on matrices only, and the learning rate of every step in closed form."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from apollo_sft.config.schema import OptimConfig, TrainerConfig
from apollo_sft.errors import ConfigError


def check_optimizer(optim: OptimConfig, strategy: str) -> None:
    """Raise ConfigError when the strategy does not keep the shapes that the optimizer needs."""
    if strategy == "fsdp" and optim.name != "adamw":
        raise ConfigError(
            f"optim.name={optim.name} needs matrices, but model.strategy=fsdp flattens them",
            found="model.strategy=fsdp on several processes",
            fix="model.strategy=fsdp2, or optim.name=adamw",
        )


def build_optimizer(
    model: nn.Module, optim: OptimConfig, num_dims: Callable[[nn.Parameter], int] = Tensor.dim
) -> Optimizer:
    """Build the optimizer of the trainable parameters. Norm gains and biases (fewer than two dims) are not decayed.

    `num_dims`: of a complete parameter, where its shard has others. The learning rate is set before every step, see
    `Schedule`.
    """
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    beta1, beta2 = optim.betas
    settings: dict[str, Any] = {"lr": optim.lr, "betas": (beta1, beta2)}
    if optim.name == "adamw_8bit":
        from apollo_sft.train.optim.adamw_8bit import AdamW8bit

        return AdamW8bit(_groups(trainable, optim, num_dims), **settings)

    hidden: set[nn.Parameter] = set()
    if optim.name == "muon":
        hidden = _hidden_matrices(model)
    rest = _groups([p for p in trainable if p not in hidden], optim, num_dims)
    if not hidden:
        return AdamW(rest, fused=True, **settings)

    from apollo_sft.train.optim.muon import CombinedOptimizer, Muon

    parts: list[Optimizer] = []
    if rest:
        parts.append(AdamW(rest, fused=True, **settings))
    matrices = [p for p in trainable if p in hidden]
    if matrices:
        parts.append(Muon([{"params": matrices, "weight_decay": optim.weight_decay}], lr=optim.lr))
    return CombinedOptimizer(parts)


def _groups(
    parameters: list[nn.Parameter], optim: OptimConfig, num_dims: Callable[[nn.Parameter], int]
) -> list[dict[str, Any]]:
    groups = [
        {"params": [p for p in parameters if num_dims(p) >= 2], "weight_decay": optim.weight_decay},
        {"params": [p for p in parameters if num_dims(p) < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def _hidden_matrices(model: Any) -> set[nn.Parameter]:
    """Return the matrices between the embeddings and the head.

    Embeddings and head, and their adapters, are left out: their rows are tokens. The experts of a layer in one tensor
    of three dims are left out too, since torch's Muon takes matrices only, and their adapters, which are stacked.
    """
    from apollo_sft.model.experts import wrapped

    ends = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    ends += [model.get_input_embeddings(), model.get_output_embeddings(), *(outer for _, outer in wrapped(model))]
    outside: set[nn.Parameter] = set()
    for module in ends:
        outside.update(module.parameters())
    return {p for p in model.parameters() if p.dim() == 2 and p not in outside}


def new_state(parameter: Tensor, group: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the state of a parameter before the first step, as the optimizer of its group creates it."""
    if "momentum" in group:
        return {"momentum_buffer": torch.zeros_like(parameter)}

    # Only the fused AdamW keeps its counter on the device.
    device = torch.device("cpu")
    if "fused" in group:
        device = parameter.device
    state = {"step": torch.zeros((), dtype=torch.float32, device=device)}
    for name in ("exp_avg", "exp_avg_sq"):
        if "fused" in group:
            state[name] = torch.zeros_like(parameter)
        else:
            from apollo_sft.train.optim.adamw_8bit import quantised_zeros

            state |= quantised_zeros(parameter, name)
    return state


def fill_state(optimizer: Optimizer) -> None:
    """Give every parameter the state of `new_state`."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter] = new_state(parameter, group)


def state_bytes(optimizer: Optimizer, local: bool = False) -> int:
    """Return the bytes of the optimizer's state before it exists; on meta too. `local`: of this rank's shards only."""
    total = 0
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            held = parameter
            if local:
                held = getattr(parameter, "_local_tensor", parameter)
            state = new_state(torch.empty(held.shape, dtype=held.dtype, device="meta"), group)
            total += sum(tensor.nbytes for tensor in state.values() if tensor.dim())
    return total


@dataclass(frozen=True, slots=True)
class Schedule:
    """Linear warm-up, then `cosine` (to the end) or `wsd` (stable, then a half cosine), down to `peak * min_ratio`."""

    kind: Literal["cosine", "wsd"]

    peak: float
    """The largest learning rate."""

    total_steps: int
    """The optimizer steps that will really run; the end value is reached after the last of them."""

    warmup_steps: int

    min_ratio: float
    """The end value as a share of the peak."""

    stable_ratio: float
    """The share of the steps after warm-up that `wsd` keeps at the peak."""

    def rate(self, step: int) -> float:
        """Return the learning rate of step `step` (from 0). It is above 0 from the first step on."""
        if step < self.warmup_steps:
            return self.peak * (step + 1) / self.warmup_steps

        after = self.total_steps - self.warmup_steps
        stable = 0
        if self.kind == "wsd":
            stable = int(after * self.stable_ratio)
        progress = max(0, step - self.warmup_steps - stable) / max(1, after - stable)
        cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
        return self.peak * (self.min_ratio + (1 - self.min_ratio) * cosine)


def warmup_steps(total_steps: int, steps: int, ratio: float) -> int:
    """Return `steps` when it is given (0 or more), else that share of the run; never more than the run has."""
    if steps < 0:
        steps = int(total_steps * ratio)
    return min(total_steps, steps)


def schedule_of(trainer: TrainerConfig, optim: OptimConfig, steps_in_epoch: int) -> Schedule:
    """Build the schedule of the learning rate over the steps that will really run.

    Raises: ConfigError when there is no step.
    """
    total = trainer.total_training_steps or trainer.total_epochs * steps_in_epoch
    if steps_in_epoch == 0:
        raise ConfigError(
            "there is no step to train: data.drop_last=true drops the only batch",
            found="fewer samples than data.train_batch_size",
            fix="data.drop_last=false, or a smaller data.train_batch_size",
        )
    return Schedule(
        kind=optim.lr_scheduler,
        peak=optim.lr,
        total_steps=total,
        warmup_steps=warmup_steps(total, optim.lr_warmup_steps, optim.warmup_steps_ratio),
        min_ratio=optim.min_lr_ratio,
        stable_ratio=optim.stable_ratio,
    )

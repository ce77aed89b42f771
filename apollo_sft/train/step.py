"""One optimizer step: the gradient of the token mean of the global batch, checked, clipped, applied."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_
from torch.optim import Optimizer

from apollo_sft.data.batch.loader import StepBatch
from apollo_sft.errors import TrainingError
from apollo_sft.model.sft_model import SftModel
from apollo_sft.parallel.consensus import Vote
from apollo_sft.parallel.launch import World
from apollo_sft.report.metrics import peak_bytes
from apollo_sft.train.strategy import strategy_of

NAMED_ROWS = 8
"""Rows that an error names."""


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step gave, the same on every rank."""

    loss: float
    """The token mean of the global batch."""

    grad_norm: float
    """The norm of the gradient before clipping."""

    peak_bytes: int
    """The largest over ranks."""

    votes: Vote
    """Those of any rank."""

    source_sums: list[float] = field(default_factory=list)
    """The loss sum of each source."""


def train_step(
    model: SftModel, optimizer: Optimizer, batch: StepBatch, world: World, clip: float | None, vote: Vote = Vote.NOTHING
) -> StepResult:
    """Run one step at the learning rate that the optimizer's groups hold.

    Every rank's gradient is its sum over targets times ranks / targets of the global batch. Sharding averages over
    ranks, which gives the gradient of the token mean of the global batch, however it was split.
    Raises: TrainingError when the loss or the gradient is not finite; no weight is changed then.
    """
    strategy = strategy_of(model)
    optimizer.zero_grad(set_to_none=True)
    losses = []
    of_sources = torch.zeros(len(batch.sources), dtype=torch.float64, device=world.device)
    for number, micro_batch in enumerate(batch.micro_batches, start=1):
        # With `reduces_once` gradients add up on each rank, and are reduced with the last micro-batch only.
        strategy.reduce_gradients(model, not model.reduces_once or number == len(batch.micro_batches))
        loss_sum = model.loss_sum(micro_batch, world.device, of_sources)
        (loss_sum * (world.size / batch.num_targets)).backward()  # type: ignore[no-untyped-call]
        losses.append(loss_sum.detach())

    # The loss is read after all micro-batches: reading a number waits for the GPU.
    mine = [float(torch.stack(losses).sum()), peak_bytes(world.device), float(vote), *of_sources.tolist()]
    facts = _from_all_ranks(mine, world)
    loss = float(facts[:, 0].sum()) / batch.num_targets

    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norm = strategy.grad_norm(model, parameters)
    grad_norm = float(norm)
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        raise _not_finite(batch, losses, loss, grad_norm)

    if clip:
        clip_grads_with_norm_(parameters, clip, norm)
    optimizer.step()

    votes = Vote.NOTHING
    for value in facts[:, 2].tolist():
        votes |= Vote(int(value))
    return StepResult(loss, grad_norm, int(facts[:, 1].max()), votes, facts[:, 3:].sum(0).tolist())


def _from_all_ranks(values: list[float], world: World) -> Tensor:
    """Return the values of all ranks, float64 of shape (ranks, values), on every rank.

    One collective a step serves the loss and all else.
    """
    mine = torch.tensor(values, dtype=torch.float64, device=world.device)
    if world.size == 1:
        return mine[None].cpu()
    gathered = mine.new_empty(world.size * len(values))
    dist.all_gather_single(gathered, mine)
    return gathered.view(world.size, len(values)).cpu()


def _not_finite(batch: StepBatch, losses: list[Tensor], loss: float, grad_norm: float) -> TrainingError:
    """Return the error that names the rows of the micro-batches whose loss is not finite, over all ranks.

    Where every loss is finite, and only the gradient is not, it names all rows of the step.
    """
    mine: list[str] = []
    for rows, value in zip(batch.rows, losses, strict=True):
        # A loss that is not finite on another rank: the rows of that rank are named, not those of this one.
        if not torch.isfinite(value) or math.isfinite(loss):
            mine += map(str, rows)

    everyone: list[list[str]] = [mine]
    if dist.is_initialized():
        everyone = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(everyone, mine)
    found = list(itertools.chain.from_iterable(everyone))
    named = "; ".join(found[:NAMED_ROWS])
    if len(found) > NAMED_ROWS:
        named += " …"
    return TrainingError(
        f"step {batch.step + 1}: the loss or its gradient is not finite; the step was not applied and the run stops",
        found=f"loss {loss}, gradient norm {grad_norm}, rows: {named}",
        expected="finite numbers",
        fix="look at these rows; lower optim.lr or set optim.clip_grad; bf16 may overflow where fp32 does not",
    )

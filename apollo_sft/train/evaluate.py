"""Validation: the token mean over every row, whatever the batch and rank count."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from apollo_sft.data.loader import Loader
from apollo_sft.data.plan import steps_per_epoch
from apollo_sft.errors import TrainingError
from apollo_sft.model.sft_model import SftModel
from apollo_sft.parallel.fsdp2 import sum_over_ranks
from apollo_sft.parallel.launch import World
from apollo_sft.train.assemble import strategy_of


@torch.no_grad()
def evaluate(
    model: SftModel, loader: Loader, world: World, stopped: Callable[[], bool] = lambda: False
) -> tuple[float, int] | None:
    """Loss and number of targets over the loader's whole store. The loader's plan must not shuffle or drop.

    `stopped` is asked after each batch, on all ranks, and says the same on all: whether to end here, with None.

    Raises: TrainingError on every rank when the loss is not finite.
    """
    model.eval()
    total = torch.zeros((), dtype=torch.float64, device=world.device)
    interrupted = False
    for batch in loader.batches(range(steps_per_epoch(len(loader.store), loader.spec))):
        for micro_batch in batch.micro_batches:
            total += model.loss_sum(micro_batch, world.device)
        if interrupted := stopped():
            break
    model.train()
    strategy_of(model).reshard(model)
    if interrupted:
        return None
    num_targets = int(loader.store.num_targets.sum(dtype="int64"))
    loss = float(sum_over_ranks(total)) / num_targets
    if not math.isfinite(loss):
        raise TrainingError(
            "the validation loss is not finite; the run stops",
            found=loss,
            fix="look at the rows of data.val_files; lower optim.lr or set optim.clip_grad",
        )
    return loss, num_targets

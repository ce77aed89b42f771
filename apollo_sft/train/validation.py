"""Validation: the token mean over every row, whatever the batch and rank count."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from apollo_sft.data.batch.loader import Loader
from apollo_sft.data.batch.plan import steps_per_epoch
from apollo_sft.errors import TrainingError
from apollo_sft.model.sft_model import SftModel
from apollo_sft.parallel.consensus import any_rank, sum_over_ranks
from apollo_sft.parallel.launch import World
from apollo_sft.report.metrics import Record, source_record, val_record
from apollo_sft.train.run_state import Run
from apollo_sft.train.signals import StopFlag, not_stopped
from apollo_sft.train.strategy import strategy_of


def validation_record(run: Run, stop: StopFlag, step: int) -> Record | None:
    """Return `val/…` metrics over the whole validation store; empty without one; None when a signal stopped it.

    The replies of the model to the first prompts, after `step` steps, are reported too.
    """
    if run.val is None:
        return {}

    def stopped() -> bool:
        return any_rank(stop.name is not None, run.world)

    found = evaluate(run.model, run.val, run.world, stopped)
    if found is None:
        return None
    if run.generations is not None:
        run.reporter.replies(step, run.generations.replies(run.model, stopped))
    loss, targets, of_sets = found
    return val_record(loss, targets) | of_sets


@torch.no_grad()
def evaluate(
    model: SftModel, loader: Loader, world: World, stopped: Callable[[], bool] = not_stopped
) -> tuple[float, int, Record] | None:
    """Return loss and number of targets over the loader's whole store, and `val/NAME/…` of each named set in it.

    The loader's plan must not shuffle or drop.

    `stopped` is called after each batch, on all ranks, and returns the same on all: whether to end here, with None.

    Raises: TrainingError on every rank when the loss is not finite.
    """
    model.eval()
    sets = {}
    if loader.mixture is not None:
        sets = loader.mixture.in_store(loader.store.num_targets)
    total = torch.zeros((), dtype=torch.float64, device=world.device)
    of_sets = total.new_zeros(len(sets))
    interrupted = False
    for batch in loader.batches(range(steps_per_epoch(len(loader.store), loader.spec))):
        for micro_batch in batch.micro_batches:
            total += model.loss_sum(micro_batch, world.device, of_sets)
        interrupted = stopped()
        if interrupted:
            break

    # Also after a stop: the state that is saved next is gathered from the shards.
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
    sums: list[float] = []
    if sets:
        sums = sum_over_ranks(of_sets).tolist()
    return loss, num_targets, source_record("val", sums, sets)

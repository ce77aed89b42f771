"""Validation: the token mean over every row, whatever the batch and rank count."""

from __future__ import annotations

import torch

from apollo_sft.data.loader import Loader
from apollo_sft.data.plan import steps_per_epoch
from apollo_sft.model.sft_model import SftModel
from apollo_sft.parallel.fsdp2 import sum_over_ranks
from apollo_sft.parallel.launch import World


@torch.no_grad()
def evaluate(model: SftModel, loader: Loader, world: World) -> tuple[float, int]:
    """Loss and number of targets over the loader's whole store. The loader's plan must not shuffle or drop."""
    model.eval()
    total = torch.zeros((), dtype=torch.float64, device=world.device)
    for batch in loader.batches(range(steps_per_epoch(len(loader.store), loader.spec))):
        for micro_batch in batch.micro_batches:
            total += model.loss_sum(micro_batch, world.device)
    model.train()
    num_targets = int(loader.store.num_targets.sum(dtype="int64"))
    return float(sum_over_ranks(total)) / num_targets, num_targets

"""Check a merged model: opened by plain transformers, it must give the loss of base and adapter."""

from __future__ import annotations

import math
from pathlib import Path

import torch

from apollo_sft.checkpoint.model_folder.sidecars import main_dtype
from apollo_sft.checkpoint.model_folder.tensor_files import read_tensors
from apollo_sft.checkpoint.room import MEMORY_RATIO, available_memory
from apollo_sft.data.batch.loader import pack
from apollo_sft.data.store.open import SampleStore
from apollo_sft.errors import CheckpointError
from apollo_sft.model.sft_model import SftModel
from apollo_sft.parallel.consensus import sum_over_ranks
from apollo_sft.parallel.launch import World
from apollo_sft.report.log import say
from apollo_sft.train.strategy import strategy_of
from apollo_sft.types import IGNORE_INDEX, Sample

MOST_TOKENS = 128
TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""Largest relative difference of the loss, by the dtype that was computed or written in."""


def probe_of(store: SampleStore) -> Sample:
    """Return the first sample of the training, or the `MOST_TOKENS` tokens around its first targets."""
    sample = store[0]
    first = int((sample.labels >= 0).argmax())
    start = max(0, min(first - MOST_TOKENS // 2, len(sample.labels) - MOST_TOKENS))
    cut = slice(start, start + MOST_TOKENS)
    return Sample(sample.input_ids[cut], sample.labels[cut], sample.ref, sample.turns)


@torch.no_grad()
def live_loss(model: SftModel, probe: Sample, world: World) -> float:
    """Return the loss sum of the probe under the trained model. Collective: every rank has the same sample."""
    model.eval()
    loss = sum_over_ranks(model.loss_sum(pack([probe], model.sp_size), world.device))
    model.train()
    strategy_of(model).reshard(model)
    # Every sequence group has computed the same loss: their number is taken out of the sum.
    return float(loss) * model.sp_size / world.size


@torch.no_grad()
def check_merged(folder: Path, probe: Sample, live: float, computed: torch.dtype, trust_remote_code: bool) -> None:
    """Compare the loss of the model in `folder`, in float32 or wider on the CPU, with the `live` one.

    `computed`: the dtype of the run's forwards. Where the host has no memory for the model, only a line is logged.
    Raises: CheckpointError when they differ.
    """
    from transformers import AutoModelForCausalLM

    tensors = {name: stored.spec for name, stored in read_tensors(folder).items()}
    written = getattr(torch, main_dtype(tensors))
    dtype = torch.promote_types(computed, torch.float32)

    needed = sum(math.prod(spec.shape) for spec in tensors.values()) * dtype.itemsize
    free = available_memory()
    if needed > MEMORY_RATIO * free:
        say(f"the merged model is not opened again: that takes {needed:,} bytes of memory, {free:,} are free")
        return

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, trust_remote_code=trust_remote_code).eval()
    ids, labels = (torch.from_numpy(part.astype("int64")) for part in (probe.input_ids, probe.labels))
    logits = model(input_ids=ids[None], use_cache=False).logits[0].double()

    found = float(torch.nn.functional.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX, reduction="sum"))
    off = abs(found - live) / max(1.0, abs(live))
    if not off <= max(TOLERANCE[computed], TOLERANCE[written]):  # NaN is not
        raise CheckpointError(
            "the merged model gives another loss than base + adapter on the same sample",
            found=f"loss {found:.6f} over {probe.num_targets} targets",
            expected=f"{live:.6f}",
        )
    say(f"opened again, the merged model gives the loss of base and adapter (relative difference {off:.0e})")

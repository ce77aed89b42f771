"""One look at the loaded model itself: packed with our attention and head, it must say what it says alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from apollo_sft.errors import ModelError
from apollo_sft.model import attention
from apollo_sft.model.sft_model import SftModel

TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-3, torch.bfloat16: 5e-2}
"""Largest relative difference of the loss: transformers computes norms and softmax in float32 whatever the weights."""


@torch.no_grad()
def prove(model: SftModel, seed: int) -> None:
    """Compare two packed documents with the same documents alone under the architecture's own eager forward.

    Runs on the unsharded model, on the device where it lies, with a handful of tokens.
    Documents that short fill no sliding window: those are compared by their sizes.
    Raises: ModelError when they differ: a layer leaks across documents, or the head is not computed as we do.
    """
    causal_lm = model.causal_lm
    documents = _documents(causal_lm.config.get_text_config().vocab_size, causal_lm.device, seed)
    causal_lm.eval()
    try:
        with attention.watch_windows() as windows:
            packed = float(_packed_loss(model, documents))
        causal_lm.set_attn_implementation("eager")
        alone = float(sum(_own_loss(causal_lm, ids) for ids in documents))
    finally:
        causal_lm.set_attn_implementation(attention.NAME)
        causal_lm.train()
    _check_windows(causal_lm, windows)
    if not abs(packed - alone) <= TOLERANCE[causal_lm.dtype] * max(1.0, abs(alone)):
        raise ModelError(
            f"{type(causal_lm).__name__} cannot be trained exactly here: packed documents do not give the loss that "
            "each gives alone",
            found=f"{packed:.6f} packed, {alone:.6f} alone (sum over {sum(len(d) - 1 for d in documents)} tokens)",
            expected="the same; a layer carries state across documents, or the logits are formed in a way of their own",
        )


def _check_windows(causal_lm: Any, windows: attention.Windows) -> None:
    kinds = getattr(causal_lm.config.get_text_config(), "layer_types", None)
    # The masks of all kinds may be asked for, though the layers are of one kind.
    expected = windows.masked if kinds is None or "sliding_attention" in kinds else set()
    if windows.attended != expected:
        raise ModelError(
            f"{type(causal_lm).__name__} cannot be trained exactly here: its sliding window is not told to attention",
            found=f"windows of {sorted(windows.attended)} tokens in attention",
            expected=f"{sorted(expected)}, as in its masks",
        )


def _documents(vocab_size: int, device: torch.device, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, vocab_size, (tokens,), generator=generator).to(device) for tokens in (5, 9)]


def _packed_loss(model: SftModel, documents: list[Tensor]) -> Tensor:
    """Every token but the last of each document predicts the next one."""
    device = documents[0].device
    positions = torch.cat([torch.arange(len(ids), device=device) for ids in documents])
    starts = torch.tensor([0, 5, 14], dtype=torch.int32, device=device)
    at = torch.tensor([i for i in range(14) if i not in (4, 13)], device=device)
    packed = torch.cat(documents)
    loss: Tensor = model(packed[None], positions[None], starts, 9, at, packed[at + 1])
    return loss


def _own_loss(causal_lm: Any, ids: Tensor) -> Tensor:
    logits = causal_lm(input_ids=ids[None], use_cache=False).logits[0]
    return nn.functional.cross_entropy(logits[:-1].double(), ids[1:], reduction="sum")

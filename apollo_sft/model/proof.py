"""A check of the loaded model itself: packed, with our attention and head, documents must have the loss of each alone.

Two documents of 5 and 9 tokens are packed into one row of 14, which runs through the training's own forward. Then each
runs alone through the forward of transformers, with eager attention and the model's own head. The two sums of losses
must agree. They do not where a layer mixes the documents, or where the logits are computed in another way than ours.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from apollo_sft.errors import ModelError
from apollo_sft.model import attention
from apollo_sft.model.sft_model import SftModel

TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-3, torch.bfloat16: 5e-2}
"""Largest relative difference of the loss. transformers computes norms and softmax in float32 even in float64."""
LENGTHS = (5, 9)
"""The tokens of the two documents."""


@torch.no_grad()
def prove(model: SftModel, seed: int) -> None:
    """Compare two packed documents with the same documents alone under the architecture's own eager forward.

    Runs on the unsharded model, on its device.
    Raises: ModelError when they differ.
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

    # So short documents do not fill a sliding window: the sizes of the windows are compared instead.
    _check_windows(causal_lm, windows)
    if not abs(packed - alone) <= TOLERANCE[causal_lm.dtype] * max(1.0, abs(alone)):
        raise ModelError(
            f"{type(causal_lm).__name__} cannot be trained exactly here: packed documents do not give the loss that "
            "each gives alone",
            found=f"{packed:.6f} packed, {alone:.6f} alone (sum over {sum(len(d) - 1 for d in documents)} tokens)",
            expected="the same; a layer carries state across documents, or the logits are computed in another way",
        )


def _check_windows(causal_lm: Any, windows: attention.Windows) -> None:
    """Raise a ModelError when a model limits its view by a mask, and its attention function receives no such window."""
    kinds = getattr(causal_lm.config.get_text_config(), "layer_types", None)
    expected = windows.masked
    # A model may request the masks of all kinds of layers, though it has layers of one kind only.
    if kinds is not None and "sliding_attention" not in kinds:
        expected = set()

    if windows.attended != expected:
        raise ModelError(
            f"{type(causal_lm).__name__} cannot be trained exactly here: transformers does not pass this model's "
            "sliding window to the attention function",
            found=f"windows of {sorted(windows.attended)} tokens in attention",
            expected=f"{sorted(expected)}, as in its masks",
        )


def _documents(vocab_size: int, device: torch.device, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, vocab_size, (tokens,), generator=generator).to(device) for tokens in LENGTHS]


def _packed_loss(model: SftModel, documents: list[Tensor]) -> Tensor:
    """Return the loss of the packed documents: every token but the last of each one predicts the next token."""
    device = documents[0].device
    first, second = LENGTHS
    total = first + second
    packed = torch.cat(documents)
    positions = torch.cat([torch.arange(len(ids), device=device) for ids in documents])
    starts = torch.tensor([0, first, total], dtype=torch.int32, device=device)

    last_tokens = (first - 1, total - 1)
    at = torch.tensor([i for i in range(total) if i not in last_tokens], device=device)
    loss: Tensor = model(packed[None], positions[None], starts, max(LENGTHS), at, packed[at + 1])
    return loss


def _own_loss(causal_lm: Any, ids: Tensor) -> Tensor:
    logits = causal_lm(input_ids=ids[None], use_cache=False).logits[0]
    return nn.functional.cross_entropy(logits[:-1].double(), ids[1:], reduction="sum")

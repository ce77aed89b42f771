"""Floating point operations of a training, counted from the shapes of a model on meta.

For example, a model with 100 weights outside of the head, all trained, 20 weights in the head, and one layer of
attention of width 8. A document of 3 tokens with 2 targets costs 6 * 100 * 3 for the weights, 6 * 20 * 2 for the head,
and 12 * 8 * 6 for attention: its positions see 1 + 2 + 3 keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from apollo_sft.model.experts import wrapped
from apollo_sft.model.four_bit import num_weights

EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
CHOSEN = ("num_experts_per_tok", "moe_topk", "num_experts_per_token")


@dataclass(frozen=True, slots=True)
class Cost:
    """The numbers of weights that a token is multiplied with."""

    active: int
    """Weights of matrix products that a token passes, outside of the head."""
    trained: int
    """Those among them that are trained."""
    head: int
    """Weights of the head, which only targets pass."""
    trained_head: int
    attention: tuple[tuple[int, int | None], ...]
    """For each layer: query heads times the mean width of keys and values, and its window."""

    def of(self, lengths: Sequence[int] | np.ndarray, targets: int) -> float:
        """Return the operations of forward and backward over documents of these lengths.

        Per weight: two in the forward, two for the gradient of its input, two for its own gradient. In attention,
        position t of a document meets t keys, twice (scores, values), and the backward costs twice as much.
        Source: PaLM, arXiv:2204.02311, appendix B, with only the causal half of attention counted.
        """
        tokens = np.asarray(lengths, dtype=np.float64)
        weights = (4 * self.active + 2 * self.trained) * float(tokens.sum())
        head = (4 * self.head + 2 * self.trained_head) * targets
        scores = sum(12 * width * float(_keys(tokens, window).sum()) for width, window in self.attention)
        return weights + head + scores


def _keys(tokens: np.ndarray, window: int | None) -> np.ndarray:
    """Count the pairs of a position and a key that it sees, for documents of so many tokens."""
    # The first `seen` positions see 1, 2, ... keys; each later one sees as many as the window holds.
    seen = tokens if window is None else np.minimum(tokens, window)
    pairs: np.ndarray = seen * (seen + 1) / 2 + (tokens - seen) * seen
    return pairs


def cost_of(causal_lm: Any) -> Cost:
    """Count the weights of a model on meta, with its adapters if it has any."""
    config = causal_lm.config.get_text_config()
    experts = next((getattr(config, n) for n in EXPERTS if getattr(config, n, None)), None)
    chosen = next((getattr(config, n) for n in CHOSEN if getattr(config, n, None)), None)

    # A lookup of an embedding is no product. Where it is tied to the head, the weight counts there.
    looked_up: set[int] = set()
    for module in causal_lm.modules():
        if isinstance(module, nn.Embedding):
            looked_up.update(id(p) for p in module.parameters(recurse=False))

    in_head = {id(p): p for p in causal_lm.get_output_embeddings().parameters() if p.ndim > 1}

    # Adapters of fused experts are matrices, of which a token uses the parts of its experts, as of the experts.
    adapts: set[int] = set()
    for _, outermost in wrapped(causal_lm):
        adapts.update(id(p) for p in outermost.parameters() if p.ndim == 2)

    active = 0
    trained = 0
    sizes = num_weights(causal_lm)

    for parameter in causal_lm.parameters():
        if parameter.ndim < 2 or id(parameter) in looked_up | in_head.keys():
            continue

        size = sizes[id(parameter)]
        of_experts = (parameter.ndim == 3 and parameter.shape[0] == experts) or id(parameter) in adapts
        if of_experts and experts and chosen:
            size = size * chosen // experts

        active += size
        if parameter.requires_grad:
            trained += size

    head = sum(p.numel() for p in in_head.values())
    trained_head = sum(p.numel() for p in in_head.values() if p.requires_grad)
    return Cost(active, trained, head, trained_head, tuple(_widths(config)))


def _widths(config: Any) -> list[tuple[int, int | None]]:
    """Return the width of attention and the window, layer by layer, under the names of different architectures."""
    heads = config.num_attention_heads
    keys = getattr(config, "qk_head_dim", None) or getattr(config, "head_dim", None) or config.hidden_size // heads
    values = getattr(config, "v_head_dim", None) or keys
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    window = getattr(config, "sliding_window", None)
    width = heads * (keys + values) // 2

    windows = {"sliding_attention": window}
    return [(width, windows.get(kind)) for kind in kinds]

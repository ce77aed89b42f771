"""Floating point operations of a training, counted from the shapes of a model on meta."""

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
    """Of one token. `active` and `trained`: weights of matrix products that a token passes, outside of the head, and
    those among them that are trained. `head`, `trained_head`: of the head, which only targets pass. `attention`: sum
    over layers of query heads times the mean width of keys and values, with the window of each layer.
    """

    active: int
    trained: int
    head: int
    trained_head: int
    attention: tuple[tuple[int, int | None], ...]

    def of(self, lengths: Sequence[int] | np.ndarray, targets: int) -> float:
        """Forward and backward over documents of these lengths.

        Two operations a weight in the forward, two for the gradient of what came in, two for that of the weight. In
        attention, position t of a document meets t keys, twice (scores, values), and the backward costs twice as much.
        Source: PaLM, arXiv:2204.02311, appendix B, with the causal half of attention counted alone.
        """
        tokens = np.asarray(lengths, dtype=np.float64)
        weights = (4 * self.active + 2 * self.trained) * float(tokens.sum())
        head = (4 * self.head + 2 * self.trained_head) * targets
        scores = sum(12 * width * float(_keys(tokens, window).sum()) for width, window in self.attention)
        return weights + head + scores


def _keys(tokens: np.ndarray, window: int | None) -> np.ndarray:
    """Pairs of a position and a key that it sees, of documents of so many tokens."""
    seen = tokens if window is None else np.minimum(tokens, window)
    pairs: np.ndarray = seen * (seen + 1) / 2 + (tokens - seen) * seen
    return pairs


def cost_of(causal_lm: Any) -> Cost:
    """Of a model on meta, with adapters where it has some."""
    config = causal_lm.config.get_text_config()
    experts = next((getattr(config, n) for n in EXPERTS if getattr(config, n, None)), None)
    chosen = next((getattr(config, n) for n in CHOSEN if getattr(config, n, None)), None)
    looked_up = {id(p) for m in causal_lm.modules() if isinstance(m, nn.Embedding) for p in m.parameters(recurse=False)}
    in_head = {id(p): p for p in causal_lm.get_output_embeddings().parameters() if p.ndim > 1}
    sizes = num_weights(causal_lm)
    adapts = {id(p) for _, outer in wrapped(causal_lm) for p in outer.parameters() if p.ndim == 2}
    active = trained = 0
    for parameter in causal_lm.parameters():
        if parameter.ndim < 2 or id(parameter) in looked_up | in_head.keys():
            continue
        size = sizes[id(parameter)]
        of_experts = (parameter.ndim == 3 and parameter.shape[0] == experts) or id(parameter) in adapts
        if of_experts and experts and chosen:
            size = size * chosen // experts
        active += size
        trained += size * parameter.requires_grad
    head = sum(p.numel() for p in in_head.values())
    trained_head = sum(p.numel() for p in in_head.values() if p.requires_grad)
    return Cost(active, trained, head, trained_head, tuple(_widths(config)))


def _widths(config: Any) -> list[tuple[int, int | None]]:
    heads = config.num_attention_heads
    keys = getattr(config, "qk_head_dim", None) or getattr(config, "head_dim", None) or config.hidden_size // heads
    values = getattr(config, "v_head_dim", None) or keys
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    window = getattr(config, "sliding_window", None)
    width = heads * (keys + values) // 2
    return [(width, window if kind == "sliding_attention" else None) for kind in kinds]

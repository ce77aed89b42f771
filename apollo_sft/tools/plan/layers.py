"""Find the layers of a model that are alike, and remove some of them."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping
from typing import Any

from torch import nn

Kind = tuple[Any, ...]


def layer_lists(causal_lm: Any) -> list[nn.ModuleList]:
    """Return the lists of layers of a model: those whose elements are all of classes that are not split."""
    names = set(causal_lm._no_split_modules or ())
    lists = [module for module in causal_lm.modules() if isinstance(module, nn.ModuleList)]
    return [layers for layers in lists if layers and all(type(layer).__name__ in names for layer in layers)]


def _kind(layer: nn.Module) -> Kind:
    """Return the kind of a layer. Layers of one kind hold the same bytes."""
    window = getattr(getattr(layer, "self_attn", None), "sliding_window", None)
    return (type(layer), window, *((n, p.shape, p.dtype, p.requires_grad) for n, p in layer.named_parameters()))


def num_of_kinds(causal_lm: Any) -> Counter[Kind]:
    """Return how many layers of each kind the model has."""
    return Counter(map(_kind, itertools.chain.from_iterable(layer_lists(causal_lm))))


def remove_layers(causal_lm: Any, num_layers: Mapping[Kind, int]) -> None:
    """Remove layers, in place, until there are `num_layers` of each kind."""
    for layers in layer_lists(causal_lm):
        seen: Counter[Kind] = Counter()
        for index in reversed(range(len(layers))):  # from the end: the others keep their index
            kind = _kind(layers[index])
            seen[kind] += 1
            if seen[kind] > num_layers[kind]:
                del layers[index]

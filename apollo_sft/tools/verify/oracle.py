"""The reference of every layout: the gradient in the plainest code, and the difference of another one from it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from apollo_sft.model import attention
from apollo_sft.types import IGNORE_INDEX, Sample

Gradients = dict[str, Tensor]


def oracle(model: Any, samples: Iterable[Sample]) -> tuple[float, Gradients]:
    """Return the loss and its gradients by parameter name.

    One document at a time, cross-entropy of full logits, the sum over the number of targets. `model`: a causal language
    model of transformers, unsharded, with its own attention or with ours.
    """
    model.zero_grad(set_to_none=True)
    total = torch.zeros((), dtype=torch.float64)
    targets = 0
    for sample in samples:
        ids = torch.from_numpy(sample.input_ids.astype("int64"))
        labels = torch.from_numpy(sample.labels.astype("int64"))
        logits = model(input_ids=ids[None], use_cache=False, **_documents(model, len(ids))).logits[0]
        total = total + torch.nn.functional.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX, reduction="sum")
        targets += int((labels != IGNORE_INDEX).sum())

    loss = total / targets
    loss.backward()  # type: ignore[no-untyped-call]

    gradients: Gradients = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            gradients[name] = parameter.grad
            if parameter.grad is None:  # experts that no token was sent to
                gradients[name] = torch.zeros_like(parameter)

    return float(loss.detach()), gradients


def _documents(model: Any, tokens: int) -> dict[str, Any]:
    """Return the arguments that our attention function needs besides, for a single document."""
    if model.config._attn_implementation != attention.NAME:
        return {}
    return {"document_starts": torch.tensor([0, tokens], dtype=torch.int32), "longest_document": tokens}


def differences(found: Iterator[tuple[str, Tensor]], expected: Mapping[str, Tensor]) -> Iterator[tuple[str, float]]:
    """Yield the relative L2 difference of each tensor.

    A tensor that is zero in theory (the gradient of a key bias without rotary embedding) is divided by the norm of all.
    """
    norms = {name: float(tensor.norm()) for name, tensor in expected.items()}
    total = max(sum(norm**2 for norm in norms.values()) ** 0.5, 1e-300)
    for name, tensor in found:
        scale = total
        if norms[name] > 1e-10 * total:
            scale = norms[name]
        yield name, float((tensor - expected[name]).norm()) / scale


class StaysDouble(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Turns casts from float64 to float32 off, while it is entered.

    transformers computes norms, softmax and routers in float32 whatever the weights. The order of sums over tokens then
    makes differences of 1e-7; in float64 throughout, the same function agrees to 1e-12.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        kwargs = kwargs or {}
        casts = func is torch.ops.aten._to_copy.default and args[0].dtype == torch.float64
        if casts and kwargs.get("dtype") == torch.float32:
            kwargs = kwargs | {"dtype": torch.float64}
        return func(*args, **kwargs)

"""What every layout is measured against: the gradient written down as plainly as it can be, and how far off one is."""

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
    """Ten lines: one document at a time, cross-entropy of full logits, the sum over the number of targets.

    `model`: a causal language model of transformers, unsharded, with its own attention or with ours. Its gradients are
    those of this call, and are returned by parameter name together with the loss.
    """
    model.zero_grad(set_to_none=True)
    total, targets = torch.zeros((), dtype=torch.float64), 0
    for sample in samples:
        ids, labels = (torch.from_numpy(part.astype("int64")) for part in (sample.input_ids, sample.labels))
        logits = model(input_ids=ids[None], use_cache=False, **_documents(model, len(ids))).logits[0]
        total = total + torch.nn.functional.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX, reduction="sum")
        targets += int((labels != IGNORE_INDEX).sum())
    loss = total / targets
    loss.backward()  # type: ignore[no-untyped-call]
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return float(loss.detach()), {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in trained.items()}


def _documents(model: Any, tokens: int) -> dict[str, Any]:
    """What our attention function wants besides, for a single document."""
    if model.config._attn_implementation != attention.NAME:
        return {}
    return {"document_starts": torch.tensor([0, tokens], dtype=torch.int32), "longest_document": tokens}


def differences(found: Iterator[tuple[str, Tensor]], expected: Mapping[str, Tensor]) -> Iterator[tuple[str, float]]:
    """The relative L2 difference of each tensor.

    One that is zero in theory (the gradient of a key bias without rotary embedding) is measured by the norm of all.
    """
    norms = {name: float(tensor.norm()) for name, tensor in expected.items()}
    total = max(sum(norm**2 for norm in norms.values()) ** 0.5, 1e-300)
    for name, tensor in found:
        scale = norms[name] if norms[name] > 1e-10 * total else total
        yield name, float((tensor - expected[name]).norm()) / scale


class StaysDouble(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Inside, nothing that is float64 is cast to float32.

    transformers computes norms, softmax and routers in float32 whatever the weights. The order in which it then sums
    over tokens shows at 1e-7; in float64 throughout, what is the same function agrees to 1e-12.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        kwargs = kwargs or {}
        casts = func is torch.ops.aten._to_copy.default and args[0].dtype == torch.float64
        if casts and kwargs.get("dtype") == torch.float32:
            kwargs = kwargs | {"dtype": torch.float64}
        return func(*args, **kwargs)

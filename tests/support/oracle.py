"""What a step must give, written as simply as it can be: one document at a time, full logits, plain cross-entropy."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from apollo_sft.model import attention
from apollo_sft.types import IGNORE_INDEX, Sample

Gradients = dict[str, Tensor]


def oracle_loss(causal_lm: Any, samples: Iterable[Sample]) -> tuple[Tensor, int]:
    """Sum of the cross-entropy over all targets, with its graph, and their number."""
    total, targets = torch.zeros((), dtype=torch.float64), 0
    for sample in samples:
        ids, labels = (torch.from_numpy(part.astype("int64"))[None] for part in (sample.input_ids, sample.labels))
        packed = causal_lm.config._attn_implementation == attention.NAME
        starts = torch.tensor([0, ids.shape[1]], dtype=torch.int32)
        more = {"document_starts": starts, "longest_document": ids.shape[1]} if packed else {}
        logits = causal_lm(input_ids=ids, use_cache=False, **more).logits[0].double()
        total = total + torch.nn.functional.cross_entropy(logits, labels[0], ignore_index=IGNORE_INDEX, reduction="sum")
        targets += sample.num_targets
    return total, targets


def oracle_gradients(causal_lm: Any, samples: Iterable[Sample]) -> tuple[float, Gradients]:
    """Token mean of the loss and its gradient by every parameter."""
    causal_lm.zero_grad(set_to_none=True)
    total, targets = oracle_loss(causal_lm, samples)
    (total / targets).backward()  # type: ignore[no-untyped-call]
    return float(total.detach()) / targets, {name: p.grad for name, p in causal_lm.named_parameters()}


def total_norm(gradients: Gradients) -> float:
    return float(torch.stack([gradient.norm() for gradient in gradients.values()]).norm())


def whole(tensor: Any) -> Tensor:
    """A sharded tensor put together (every rank calls it), or the tensor itself."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def worst_difference(found: Gradients, expected: Gradients) -> float:
    """The largest relative L2 difference of any tensor."""
    assert found.keys() == expected.keys()
    return max(float((found[n] - e).norm() / e.norm().clamp_min(1e-300)) for n, e in expected.items())

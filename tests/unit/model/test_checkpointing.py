"""Both policies of gradient checkpointing: what they keep for the backward, and that they change no bit."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from apollo_sft.model import attention
from apollo_sft.model.sft_model import SftModel, enable_checkpointing
from tests.support.models import tiny_config, tiny_model

TOKENS = 96
FAMILIES = {
    "Qwen2": {},
    "Gemma2": {"head_dim": 8},  # attention written out
    "Qwen3Moe": {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
}


class Held(TorchDispatchMode):
    """Notes every tensor that is made; `num_bytes` are those of the ones that are still there."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                self.made[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        return out

    def num_bytes(self) -> int:
        return sum(size for reference, size in self.made.values() if not reference.expired())


def forward_and_backward(family: str, policy: str | None) -> tuple[int, Tensor, dict[str, Tensor | None]]:
    """Bytes that the forward leaves for the backward, the loss, and the gradients."""
    attention.register(attention.sdpa_kernel)
    config = tiny_config(family, num_hidden_layers=4, **FAMILIES[family])
    causal_lm = tiny_model(config, torch.float32, attention.NAME)
    model = SftModel(causal_lm.train())
    if policy is not None:
        enable_checkpointing(causal_lm, selective=policy == "selective")
    ids = torch.arange(TOKENS)[None]
    at = torch.arange(TOKENS - 4, TOKENS)  # four targets: the head's own tensors stay small
    with Held() as held:
        loss = model(ids, ids, torch.tensor([0, 30, TOKENS], dtype=torch.int32), TOKENS - 30, at, ids[0, at])
        kept = held.num_bytes()
    loss.backward()
    return kept, loss.detach(), {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("family", FAMILIES)
def test_selective_keeps_less_than_all_and_more_than_full(family: str) -> None:
    kept, loss, gradients = forward_and_backward(family, None)
    sizes = {"none": kept}
    for policy in ("selective", "full"):
        sizes[policy], same_loss, found = forward_and_backward(family, policy)
        assert torch.equal(same_loss, loss), policy
        for name, gradient in gradients.items():
            other = found[name]
            assert (other is None) == (gradient is None), (policy, name)
            assert gradient is None or other is None or torch.equal(other, gradient), (policy, name)
    print(f"\n{family}: bytes kept for the backward: {sizes}")
    assert sizes["full"] < 0.6 * sizes["selective"]
    assert sizes["selective"] < 0.8 * sizes["none"]

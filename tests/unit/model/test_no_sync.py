"""Between the start of a micro-batch and the end of its backward nothing is read back from the device.

On a CPU a read-back shows as the operations that wait on CUDA; the kernel that goes document by document is left out,
and what a kernel of torch does inside is not seen.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from apollo_sft.data.batch.loader import pack
from apollo_sft.model import attention, load, lora
from apollo_sft.model.proof import prove
from apollo_sft.model.sft_model import SftModel
from tests.support.models import save_tiny_model, tiny_config
from tests.support.samples import random_samples
from tests.unit.model.test_experts import FAMILIES, settings

WAITS = (
    "aten::_local_scalar_dense",
    "aten::nonzero",
    "aten::masked_select",
    "aten::_unique2",
    "aten::repeat_interleave.Tensor",
)
MASKED = ("aten::index.Tensor", "aten::index_put_", "aten::index_put")
"""Wait when an index is a mask: how many places it names is not known before."""
COPIES = ("tolist", "cpu", "numpy")
"""Methods that copy from a CUDA device to the host, and show in no operation on a CPU."""
CPU = torch.device("cpu")


class Waiting(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        masks = [leaf for leaf in tree_leaves(args[1:2]) if isinstance(leaf, Tensor) and leaf.dtype == torch.bool]
        if func.name() in WAITS or (func.name() in MASKED and masks):
            self.found.append(func.name())
        return func(*args, **(kwargs or {}))


def watch_copies(monkeypatch: pytest.MonkeyPatch, found: list[str]) -> None:
    def noted(name: str, method: Any) -> Any:
        def call(self: Tensor, *args: Any, **kwargs: Any) -> Any:
            found.append(name)
            return method(self, *args, **kwargs)

        return call

    for name in COPIES:
        monkeypatch.setattr(Tensor, name, noted(name, getattr(Tensor, name)))


def all_to_all(query: Tensor, key: Tensor, value: Tensor, documents: Any, options: Any) -> Tensor:
    """Stands where a variable-length kernel stands on CUDA, which takes the starts of documents as they are."""
    return attention.one_by_one(query, key, value, [len(query)], options)


CASES: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "Qwen2": ("Qwen2", {}, []),
    "Mistral, window": ("Mistral", {"sliding_window": 5}, []),
    "Gemma3Text": ("Gemma3Text", {"head_dim": 8, "sliding_window": 4}, []),
    "LoRA on the head": ("Llama", {}, ["model.target_modules=[q_proj,lm_head]"]),
    "Qwen3Moe": ("Qwen3Moe", FAMILIES["Qwen3Moe"], []),
    "LoRA on experts": ("Qwen3Moe", FAMILIES["Qwen3Moe"], ["model.target_modules=all-linear"]),
    "LoRA on experts with biases": ("GptOss", FAMILIES["GptOss"], ["model.target_modules=all-linear"]),
}


@pytest.mark.parametrize("case", CASES)
def test_a_micro_batch_waits_for_nothing(tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    family, changes, keys = CASES[case]
    base = save_tiny_model(tmp_path / "model", tiny_config(family, **changes))
    attention.register(attention.sdpa_kernel)
    model = SftModel(load.load_with_weights(base, load.read_config(base, False), torch.float32, False))
    prove(model, seed=1)  # after which no trace of it is left
    if keys:
        lora.inject(model.causal_lm, lora.lora_config(settings(*keys), "b"), torch.float32)
        model.attach_head()
    attention.register(all_to_all)
    inputs = model.inputs(pack(random_samples(5)), CPU)
    with Waiting() as waiting:
        watch_copies(monkeypatch, waiting.found)
        model(*inputs).backward()
        monkeypatch.undo()
    assert waiting.found == []


def test_a_wait_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = torch.arange(3)
    with Waiting() as waiting:
        watch_copies(monkeypatch, waiting.found)
        assert bool((numbers >= 0).all())
        numbers.nonzero()
        numbers[numbers > 0].tolist()
        numbers.unique()
        numbers.repeat_interleave(numbers)
        monkeypatch.undo()
    expected = ["aten::_local_scalar_dense", "aten::nonzero", "aten::index.Tensor", "tolist", "aten::_unique2"]
    assert waiting.found == [*expected, "aten::repeat_interleave.Tensor"]

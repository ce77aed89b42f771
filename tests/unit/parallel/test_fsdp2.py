"""Which modules are gathered together, and what is the identity without a process group."""

import pytest
import torch
from torch import nn

from apollo_sft.errors import ConfigError
from apollo_sft.parallel.consensus import sum_over_ranks
from apollo_sft.parallel.fsdp2 import ShardSpec, blocks, reduce_gradients
from tests.support.models import tiny_config, tiny_model


def spec(*names: str, min_num_params: int = 0) -> ShardSpec:
    return ShardSpec(frozenset(names), torch.float32, torch.float32, True, min_num_params)


def names(model: nn.Module, chosen: list[nn.Module]) -> list[str]:
    return [name for name, module in model.named_modules() if any(module is one for one in chosen)]


def testblocks_by_class_name() -> None:
    model = tiny_model(tiny_config("Qwen2"))
    chosen = blocks(model, spec("Qwen2DecoderLayer"), model.lm_head)
    assert names(model, chosen) == ["model.layers.0", "model.layers.1"]


def test_a_name_that_no_module_has() -> None:
    model = tiny_model(tiny_config("Qwen2"))
    with pytest.raises(ConfigError, match=r"names no module of this model[^$]*LlamaDecoderLayer[^$]*Qwen2DecoderLayer"):
        blocks(model, spec("LlamaDecoderLayer"), model.lm_head)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("min_num_params", [1, 1000, 1600, 5000, 10**9])
def testblocks_by_size(tied: bool, min_num_params: int) -> None:
    model = tiny_model(tiny_config("Qwen2", tie_word_embeddings=tied))
    head = None if tied else model.lm_head
    chosen = blocks(model, spec(min_num_params=min_num_params), head)
    shared = {id(model.lm_head.weight)}
    owned: list[int] = []
    for module in chosen:
        inner = {
            id(p) for other in chosen if other is not module and other in module.modules() for p in other.parameters()
        }
        own = [p for p in module.parameters() if id(p) not in inner]
        assert sum(p.numel() for p in own) >= min_num_params
        assert not isinstance(module, nn.ModuleList)
        assert not shared & {id(p) for p in own}, "the head, tied or not, is not taken by a block"
        owned += [id(p) for p in own]
    assert len(owned) == len(set(owned)), "no parameter is in two groups"
    assert bool(chosen) == (min_num_params < 10**9)


def test_without_a_group_nothing_is_summed_or_held_back() -> None:
    values = torch.tensor([1.0, 2.0])
    assert sum_over_ranks(values).tolist() == [1.0, 2.0]
    reduce_gradients(nn.Linear(2, 2), wanted=False)

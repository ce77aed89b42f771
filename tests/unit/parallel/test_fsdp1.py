"""What FSDP1 cannot do right is refused; where a rank's range of a parameter lies."""

import pytest
import torch

from apollo_sft.config.compose import compose
from apollo_sft.errors import ConfigError
from apollo_sft.parallel.fsdp1 import Cut
from apollo_sft.parallel.launch import World
from apollo_sft.train.strategy import check_strategy

NO_SYNC = "model.fsdp_config.use_no_sync_for_gradient_accumulation=true"
BF16 = "model.fsdp_config.dtype=bf16"
REPLICATED = "model.fsdp_config.fsdp_size=1"


def check(processes: int, *overrides: str) -> None:
    config = compose(["data.train_files=x", "data.val_files=null", *overrides]).config
    check_strategy(config.model, config.optim, World(0, processes, 0, torch.device("cpu")))


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ([NO_SYNC, BF16], r"in bf16[^$]*use_no_sync[^$]*=true[^$]*dtype=fp32, or model.strategy=fsdp2"),
        ([REPLICATED], r"without sharding[^$]*fsdp_size=1[^$]*fsdp_size=2 or more, or model.strategy=fsdp2"),
    ],
)
def test_refused_under_fsdp_only(overrides: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        check(2, "model.strategy=fsdp", *overrides)
    check(2, *overrides)
    check(1, "model.strategy=fsdp", *overrides)


@pytest.mark.parametrize("overrides", [[NO_SYNC], [BF16], ["model.fsdp_config.cpu_offload=true"]])
def test_allowed_under_fsdp(overrides: list[str]) -> None:
    check(2, "model.strategy=fsdp", *overrides)


@pytest.mark.parametrize("sizes", [(6, 0, 0), (0, 0, 6), (1, 4, 1), (2, 2, 2)])
def test_ranges_of_all_ranks_make_the_parameter(sizes: tuple[int, ...]) -> None:
    whole = torch.arange(6.0).view(2, 3)
    parts = [Cut(whole.shape, sizes, rank).mine(whole) for rank in range(3)]
    assert tuple(part.numel() for part in parts) == sizes
    assert torch.equal(torch.cat(parts).view(2, 3), whole)

"""Which heads meet where, without processes: the exchange itself runs in tests/parity."""

import pytest
import torch

from apollo_sft.parallel.ulysses import added_heads, kv_repeats, pad_heads


@pytest.mark.parametrize("size", [1, 2, 3, 4, 8])
@pytest.mark.parametrize(
    ("heads", "kv_heads"), [(8, 8), (8, 2), (4, 1), (6, 3), (9, 3), (14, 2), (28, 4), (3, 3), (12, 4)]
)
def test_every_rank_holds_the_key_heads_of_its_query_heads(heads: int, kv_heads: int, size: int) -> None:
    owner = torch.arange(kv_heads).repeat_interleave(kv_repeats(heads, kv_heads, size))
    padded_kv = torch.cat([owner, torch.full((added_heads(len(owner), size),), -1)])
    padded_q = torch.cat([torch.arange(heads), torch.full((added_heads(heads, size),), -1)])
    for mine_q, mine_kv in zip(padded_q.chunk(size), padded_kv.chunk(size), strict=True):
        share = len(mine_q) // len(mine_kv)
        assert share * len(mine_kv) == len(mine_q)
        for place, head in enumerate(mine_q.tolist()):
            if head >= 0:
                assert mine_kv[place // share].item() == head // (heads // kv_heads)


def test_key_heads_are_not_repeated_without_need() -> None:
    assert kv_repeats(8, 8, 4) == 1
    assert kv_repeats(8, 2, 2) == 1
    assert kv_repeats(8, 2, 4) == 2


def test_padding_adds_zero_heads_at_the_end() -> None:
    states = torch.randn(1, 3, 5, 2)
    padded = pad_heads(states, 2)
    assert padded.shape == (1, 4, 5, 2)
    assert torch.equal(padded[:, :3], states)
    assert not padded[:, 3].any()

"""bfloat16 files keep on average what float32 weights have learned."""

import torch

from apollo_sft.checkpoint.model_folder.rounding import cast

BF16 = torch.bfloat16


def test_what_bfloat16_can_hold_stays_as_it_is() -> None:
    values = torch.randn(1000).to(BF16).float()
    values[:4] = torch.tensor([0.0, -0.0, float("inf"), float("-inf")])
    assert torch.equal(cast(values, BF16, "w"), values.to(BF16))
    assert cast(torch.tensor([float("nan")]), BF16, "w").isnan().all()
    assert torch.equal(cast(torch.arange(5), torch.float32, "w"), torch.arange(5).float())


def test_each_value_becomes_one_of_its_two_neighbours_and_the_mean_stays() -> None:
    step = 2.0**-7  # between neighbours from 1 to 2
    for sign in (1, -1):
        for share in (0.1, 0.5, 0.9):
            rounded = cast(torch.full((300, 400), sign * (1 + share * step)), BF16, "w").float() * sign
            assert set(rounded.unique().tolist()) == {1.0, 1 + step}
            assert abs(float((rounded - 1).mean()) / step - share) < 0.005


def test_the_same_name_gives_the_same_bits_and_another_name_others() -> None:
    values = torch.randn(64, 64)
    assert torch.equal(cast(values, BF16, "a"), cast(values.clone(), BF16, "a"))
    assert not torch.equal(cast(values, BF16, "a"), cast(values, BF16, "b"))
    assert torch.equal(cast(values, BF16, "a"), cast(values.double(), BF16, "a"))


def test_a_small_update_is_not_lost() -> None:
    """A twentieth of a step in every weight: rounded to the nearest nothing of it is left."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(512, 512, generator=generator).to(BF16).float()
    update = base.abs() * 2.0**-9 * 0.1
    x = torch.rand(512, generator=generator)
    nearest, ours = (
        (tensor.float() - base) @ x for tensor in ((base + update).to(BF16), cast(base + update, BF16, "w"))
    )
    wanted = update @ x
    assert float(nearest.norm() / wanted.norm()) < 0.01
    assert float(abs(ours.mean() / wanted.mean() - 1)) < 0.05

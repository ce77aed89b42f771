"""AdamW with averages of one byte: near to AdamW, never far from it, and small."""

import pytest
import torch
from torch import nn

from apollo_sft.train.optim.adamw_8bit import BLOCK, AdamW8bit, _levels

RATE = 0.01
SETTINGS = {"lr": RATE, "betas": (0.9, 0.95)}


def steps(optimizer: torch.optim.Optimizer, parameter: nn.Parameter, number: int, scale: torch.Tensor) -> None:
    """Gradients of a bowl around 1, and noise."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(number):
        noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
        parameter.grad = scale * (parameter.detach() - 1 + 0.3 * noise)
        optimizer.step()


def test_levels() -> None:
    signed, squares = _levels(True), _levels(False)
    assert len(signed) == 256
    assert len(squares) == 255
    assert squares[0] > 0, "a square is never rounded to 0"
    for levels in (signed, squares):
        assert levels[-1] == 1
        assert (levels[1:] > levels[:-1]).all()
    assert 0 in signed
    assert set(-signed[:127].flip(0).numpy()) == set(signed[128:255].numpy())


@pytest.mark.parametrize("shape", [(6, BLOCK), (5, BLOCK + 3), (3, 4, 100), (9,)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_it_stays_near_adamw(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    scale = 10.0 ** torch.linspace(-5, 2, shape[-1], dtype=dtype)  # gradients of very different sizes in a block
    small, large = (nn.Parameter(torch.zeros(shape, dtype=dtype)) for _ in range(2))
    steps(AdamW8bit([{"params": [small], "weight_decay": 0.1}], **SETTINGS), small, 60, scale)
    steps(torch.optim.AdamW([large], weight_decay=0.1, **SETTINGS), large, 60, scale)
    if len(shape) == 1:
        torch.testing.assert_close(small, large, rtol=1e-5, atol=1e-6)
    else:
        apart = (small - large).abs()
        assert not torch.equal(small, large)
        near = scale >= 0.1 * scale.max()  # the rest lies where the levels of its block are coarse, or below them
        assert apart[..., near].norm() < 0.05 * large[..., near].norm()
        assert small.abs().max() < 2 * large.abs().max()


def test_a_gradient_that_ends_is_no_leap() -> None:
    """A value whose square was rounded to 0 would be divided by eps."""
    weight = nn.Parameter(torch.zeros(2, BLOCK))
    optimizer = AdamW8bit([{"params": [weight], "weight_decay": 0.0}], **SETTINGS)
    scale = torch.full((2, BLOCK), 1e-4)
    scale[:, 0] = 1.0
    weight.grad = scale.clone()
    optimizer.step()
    before = weight.detach().clone()
    weight.grad = torch.zeros_like(weight)
    optimizer.step()
    assert (weight - before).abs().max() <= RATE


def test_a_byte_for_each_value() -> None:
    weight = nn.Parameter(torch.zeros(64, 1024))
    optimizer = AdamW8bit([{"params": [weight], "weight_decay": 0.0}], **SETTINGS)
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    held = sum(tensor.nbytes for name, tensor in optimizer.state[weight].items() if name != "step")
    assert held == 2 * (weight.numel() + 4 * weight.numel() // BLOCK)


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = []
    for elements in (2**22, 700):
        monkeypatch.setattr("apollo_sft.train.optim.adamw_8bit.CHUNK_ELEMENTS", elements)
        weight = nn.Parameter(torch.zeros(10, 300))
        steps(AdamW8bit([{"params": [weight], "weight_decay": 0.0}], **SETTINGS), weight, 5, torch.ones(300))
        weights.append(weight.detach())
    assert torch.equal(*weights)

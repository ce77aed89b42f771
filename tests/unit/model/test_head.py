"""The fused head against logits written out, in fp64: loss and every gradient."""

import pytest
import torch
from torch import Tensor, nn

from apollo_sft.model import head
from apollo_sft.model.head import HeadSpec, attach_loss, chunk_rows, target_loss


def written_out(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, spec: HeadSpec) -> Tensor:
    logits = nn.functional.linear(hidden, weight, bias) * spec.scale
    if spec.softcap is not None:
        logits = spec.softcap * torch.tanh(logits / spec.softcap)
    return nn.functional.cross_entropy(logits, labels, reduction="sum")


def inputs(rows: int, bias: bool, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    torch.manual_seed(0)
    hidden = torch.randn(rows, 6, dtype=dtype, requires_grad=True)
    weight = torch.randn(11, 6, dtype=dtype, requires_grad=True)
    offset = torch.randn(11, dtype=dtype, requires_grad=True) if bias else None
    return hidden, weight, offset, torch.randint(0, 11, (rows,))


@pytest.mark.parametrize("rows", [1, 5, 13])
@pytest.mark.parametrize("chunk_rows", [1, 4, 100])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("spec", [HeadSpec(), HeadSpec(scale=0.25), HeadSpec(softcap=2.0), HeadSpec(0.5, 3.0)])
def test_loss_and_gradients_equal_full_logits(
    rows: int, chunk_rows: int, bias: bool, spec: HeadSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head, "CHUNK_ROWS", chunk_rows)
    ours, oracle = inputs(rows, bias), inputs(rows, bias)
    loss = target_loss([(ours[0], ours[1])], ours[2], ours[3], spec)
    expected = written_out(*oracle[:3], oracle[3], spec)
    (loss * 0.37).backward()
    (expected * 0.37).backward()
    torch.testing.assert_close(loss, expected, rtol=1e-13, atol=1e-13)
    for mine, theirs in zip(ours[:3], oracle[:3], strict=True):
        if mine is not None and theirs is not None:
            torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("chunk_rows", [1, 4, 100])
def test_sources_have_their_sums_and_change_no_bit(chunk_rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The third of four sources has no target."""
    monkeypatch.setattr(head, "CHUNK_ROWS", chunk_rows)
    spec, of_target = HeadSpec(0.5, 3.0), torch.tensor([0, 3, 3, 1, 0, 1, 3, 3, 0, 0, 1, 3, 0])
    plain, told = inputs(13, True), inputs(13, True)
    alone = target_loss([(plain[0], plain[1])], plain[2], plain[3], spec)
    loss, sums = target_loss([(told[0], told[1])], told[2], told[3], spec, (of_target, 4))
    assert torch.equal(loss, alone)
    assert sums.dtype == torch.float64
    assert not sums.requires_grad
    alone.backward()
    loss.backward()
    for mine, theirs in zip(told[:3], plain[:3], strict=True):
        assert mine is not None and theirs is not None
        assert mine.grad is not None
        assert torch.equal(mine.grad, theirs.grad)
    for source in range(4):
        at = of_target == source
        expected = written_out(told[0][at], told[1], told[2], told[3][at], spec).detach()
        torch.testing.assert_close(sums[source], expected.double(), rtol=1e-13, atol=1e-13)
    assert sums[2] == 0


def test_no_target_gives_zero_and_still_a_gradient_for_the_weight() -> None:
    hidden, weight, _, labels = inputs(0, False)
    loss = target_loss([(hidden, weight)], None, labels, HeadSpec())
    loss.backward()
    assert loss.item() == 0.0
    assert weight.grad is not None
    assert weight.grad.abs().sum().item() == 0.0


def test_a_frozen_head_forms_no_weight_gradient() -> None:
    hidden, weight, _, labels = inputs(4, False)
    frozen = weight.detach()
    target_loss([(hidden, frozen)], None, labels, HeadSpec()).backward()
    assert hidden.grad is not None
    assert frozen.grad is None


def test_without_grad_only_the_loss_is_formed() -> None:
    hidden, weight, _, labels = inputs(4, False)
    with torch.no_grad():
        loss = target_loss([(hidden, weight)], None, labels, HeadSpec())
    assert not loss.requires_grad
    torch.testing.assert_close(loss, written_out(hidden, weight, None, labels, HeadSpec()).detach())


def test_bf16_sums_its_weight_gradient_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "CHUNK_ROWS", 1)
    hidden, weight, _, labels = inputs(256, False, torch.bfloat16)
    target_loss([(hidden, weight)], None, labels, HeadSpec()).backward()
    wide_weight = weight.detach().double().requires_grad_()
    written_out(hidden.detach().double(), wide_weight, None, labels, HeadSpec()).backward()
    assert weight.grad is not None
    error = (weight.grad.double() - wide_weight.grad).norm() / wide_weight.grad.norm()
    assert error < 5e-3, "256 chunks summed in bf16 would lose far more"


def test_the_head_module_carries_the_loss() -> None:
    linear = nn.Linear(6, 11, bias=False, dtype=torch.float64)
    attach_loss(linear, HeadSpec())
    hidden, _, _, labels = inputs(4, False)
    torch.testing.assert_close(
        linear.loss(hidden, labels), written_out(hidden, linear.weight, None, labels, HeadSpec())
    )


def test_gradients_are_scaled_where_they_are() -> None:
    """A second one of the weight would be there while all activations are. What was scaled is not scaled again."""
    hidden, weight = torch.randn(5, 4, requires_grad=True), torch.randn(7, 4, requires_grad=True)
    loss = target_loss([(hidden, weight)], None, torch.tensor([0, 1, 2, 3, 4]), HeadSpec())
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_wide_head_takes_longer_chunks() -> None:
    """Its logits and their gradient, in float32, are a quarter of the weight's gradient."""
    assert chunk_rows(896) == 256
    assert 2 * chunk_rows(8192) / 8192 == 0.25

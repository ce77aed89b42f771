"""The per-document kernel against attention with one big block mask."""

import pytest
import torch
from torch import Tensor

from apollo_sft.errors import ConfigError
from apollo_sft.model.attention import (
    AttentionOptions,
    Documents,
    choose_kernel,
    flash_kernel,
    sdpa_kernel,
    varlen_kernel,
)

STARTS = torch.tensor([0, 3, 4, 11, 16], dtype=torch.int32)


def masked(query: Tensor, key: Tensor, value: Tensor, options: AttentionOptions) -> Tensor:
    """Dense attention over the whole pack: (tokens, heads, head dim) in and out."""
    tokens, heads, width = query.shape
    document = torch.bucketize(torch.arange(tokens), STARTS[1:].long(), right=True)
    distance = torch.arange(tokens)[:, None] - torch.arange(tokens)[None, :]
    visible = (document[:, None] == document[None, :]) & (distance >= 0) & (distance < (options.window or tokens))
    out = torch.empty_like(query)
    for head in range(heads):
        kv = head // (heads // key.shape[1])
        scores = query[:, head] @ key[:, kv].T * (options.scaling or width**-0.5)
        if options.softcap:
            scores = options.softcap * torch.tanh(scores / options.softcap)
        weights = scores.masked_fill(~visible, float("-inf")).exp()
        total = weights.sum(-1, keepdim=True) + (options.sinks[head].exp() if options.sinks is not None else 0.0)
        out[:, head] = weights / total @ value[:, kv]
    return out


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("window", [None, 1, 2, 5, 100])
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("sinks", [False, True])
def test_documents_are_isolated_and_scores_are_exact(
    kv_heads: int, window: int | None, softcap: float | None, sinks: bool
) -> None:
    torch.manual_seed(0)
    query = torch.randn(16, 4, 8, dtype=torch.float64)
    key, value = (torch.randn(16, kv_heads, 8, dtype=torch.float64) for _ in range(2))
    sink = torch.randn(4, dtype=torch.float64) if sinks else None
    options = AttentionOptions(0.3, 0.0, window, softcap, sink)
    ours = sdpa_kernel(query, key, value, Documents(STARTS, 7), options)
    torch.testing.assert_close(ours, masked(query, key, value, options), rtol=1e-12, atol=1e-12)


def test_changing_one_document_changes_no_bit_of_another() -> None:
    torch.manual_seed(0)
    query, key, value = (torch.randn(16, 4, 8) for _ in range(3))
    options = AttentionOptions(None, 0.0, None, None, None)
    before = sdpa_kernel(query, key, value, Documents(STARTS, 7), options)
    for states in (query, key, value):
        states[4:11] += 1.0
    after = sdpa_kernel(query, key, value, Documents(STARTS, 7), options)
    assert torch.equal(before[:4], after[:4])
    assert torch.equal(before[11:], after[11:])
    assert not torch.equal(before[4:11], after[4:11])


@pytest.mark.parametrize("kernel", [varlen_kernel, flash_kernel])
def test_cuda_kernels_serve_fp32_by_the_reference(kernel: object) -> None:
    torch.manual_seed(0)
    query, key, value = (torch.randn(16, 4, 8) for _ in range(3))
    options = AttentionOptions(None, 0.0, None, None, None)
    expected = sdpa_kernel(query, key, value, Documents(STARTS, 7), options)
    assert torch.equal(kernel(query, key, value, Documents(STARTS, 7), options), expected)


def test_the_choice_on_a_cpu() -> None:
    kernel, why = choose_kernel("auto", torch.device("cpu"))
    assert kernel is sdpa_kernel
    assert "SDPA" in why
    for wanted in ("flash", "varlen"):
        with pytest.raises(ConfigError, match=r"model\.attn_implementation"):
            choose_kernel(wanted, torch.device("cpu"))

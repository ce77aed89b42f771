"""The CUDA attention kernels against the per-document reference, forward and backward, in bf16."""

import importlib.util

import pytest
import torch

from apollo_sft.model.attention import AttentionOptions, Documents, Kernel, flash_kernel, sdpa_kernel, varlen_kernel

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
KERNELS = [
    varlen_kernel,
    pytest.param(
        flash_kernel,
        marks=pytest.mark.skipif(importlib.util.find_spec("flash_attn") is None, reason="flash-attn not installed"),
    ),
]
STARTS = [0, 3, 4, 130, 515]


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("window", [None, 1, 64])
@pytest.mark.parametrize("kv_heads", [2, 8])
def test_kernel_equals_the_reference(kernel: Kernel, window: int | None, kv_heads: int) -> None:
    torch.manual_seed(0)
    documents = Documents(torch.tensor(STARTS, dtype=torch.int32, device="cuda"), 385)
    options = AttentionOptions(0.1, 0.0, window, None, None)
    shapes = ((515, 8, 64), (515, kv_heads, 64), (515, kv_heads, 64))
    inputs = [torch.randn(shape, device="cuda") for shape in shapes]
    upstream = torch.randn(shapes[0], device="cuda")
    results = []
    for attend, dtype in ((kernel, torch.bfloat16), (sdpa_kernel, torch.float32)):
        leaves = [tensor.to(torch.bfloat16).to(dtype).requires_grad_() for tensor in inputs]
        output = attend(*leaves, documents, options)
        output.backward(upstream.to(torch.bfloat16).to(dtype))
        results.append([output, *(leaf.grad for leaf in leaves)])
    for ours, reference in zip(*results, strict=True):
        error = (ours.float() - reference.float()).norm() / reference.float().norm()
        assert error < 2e-2

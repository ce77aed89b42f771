"""Liger's kernels on CUDA against transformers' own, forward and backward."""

import importlib.util

import pytest
import torch

from tests.support.liger import FAMILIES, model_of, step, with_kernels
from tests.support.oracle import worst_difference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.skipif(importlib.util.find_spec("liger_kernel") is None, reason="liger-kernel not installed"),
]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 5e-2)])
def test_gradients_are_those_without(family: str, dtype: torch.dtype, tolerance: float) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    loss, gradients = step(model_of(family, "cuda", dtype))
    found, others = step(with_kernels(model_of(family, "cuda", dtype)))
    assert found == pytest.approx(loss, rel=tolerance)
    assert worst_difference(others, gradients) < tolerance

from pathlib import Path

import pytest
import torch

from apollo_sft.report.metrics import peak_bytes


def test_on_cpu_it_is_the_peak_that_the_kernel_counts() -> None:
    ours = peak_bytes(torch.device("cpu"))
    status = Path("/proc/self/status").read_text()
    kernel = int(status.split("VmHWM:")[1].split()[0]) * 1024
    assert ours == pytest.approx(kernel, rel=0.05)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_cuda_it_is_the_peak_of_the_allocator() -> None:
    device = torch.device("cuda", 0)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    block = torch.empty(2**24, dtype=torch.uint8, device=device)
    assert block.nbytes == 2**24
    del block
    assert before + 2**24 <= peak_bytes(device) < before + 2**25

import subprocess
import sys

import pytest
import torch

from apollo_sft.report.metrics import peak_bytes
from tests.support import python

PEAK = """
import torch
from apollo_sft.report.metrics import peak_bytes, peak_resident_bytes

before = peak_resident_bytes()
size = before + 2**26
block = b"x" * size
assert len(block) == size
del block
print(before, peak_bytes(torch.device("cpu")))
"""


def test_on_cpu_it_is_the_peak_and_not_what_is_held_now() -> None:
    # In a process that holds little: the block has to be larger than all that its process has ever held.
    finished = python.run([sys.executable, "-c", PEAK], check=True, capture_output=True, text=True)
    before, peak = map(int, finished.stdout.split())
    assert peak >= before + 2**26


def test_the_size_of_the_process_that_started_this_one_does_not_count() -> None:
    child = "from apollo_sft.report.metrics import peak_resident_bytes; print(peak_resident_bytes())"
    large = f"import subprocess, sys; x = b'x' * 2**30; subprocess.run([sys.executable, '-c', {child!r}], check=True)"
    finished = subprocess.run([sys.executable, "-c", large], check=True, capture_output=True, text=True)
    assert 2**22 < int(finished.stdout) < 2**30


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

"""How much memory this process has needed at most."""

import resource

import torch


def peak_bytes(device: torch.device) -> int:
    """Peak of what PyTorch's allocator held on a CUDA device; elsewhere the peak resident size of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

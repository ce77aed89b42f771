"""float32 weights in bfloat16 files, without losing what was learned.

A fine-tuning changes most weights by less than half of what bfloat16 can tell apart: rounded to the nearest, they fall
back to where they started. Rounded up or down by chance, in proportion, each keeps its change on average, and a matrix
product sees the average. The chance is a function of the tensor's name and the place in it: the same weights give the
same files, however they are sharded. A number that bfloat16 can hold stays as it is.

A float32 is a bfloat16 with 16 more bits. The weight 1.0 + 1/512, for example, is a quarter of the way from 1.0 to the
next bfloat16, 1.0 + 1/128: its low bits are 0x4000. A hash between 0 and 0xFFFF is added to the low bits and the sum is
cut: for one hash in four it carries over, and the weight is rounded up.

Source: stochastic rounding, arXiv:1502.02551.
"""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate

CHUNK_ELEMENTS = 2**24
LOW_BITS = 0xFFFF
"""The bits of a float32 that bfloat16 lacks."""


def cast(tensor: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """Return the tensor in `dtype`; float32 and wider become bfloat16 by chance, all else as torch casts it.

    A sharded tensor must be cut along its first dim.
    """
    if dtype != torch.bfloat16 or tensor.dtype not in (torch.float32, torch.float64):
        return tensor.to(dtype)
    if not isinstance(tensor, DTensor):
        return _rounded(tensor.float(), name, 0)

    rounded = _rounded(tensor.to_local().float(), name, _first_element(tensor))
    return DTensor.from_local(
        rounded, tensor.device_mesh, tensor.placements, shape=tensor.shape, stride=tensor.stride()
    )


def _first_element(tensor: DTensor) -> int:
    """Return the position in the whole tensor of the first element of this rank's shard."""
    for axis, placement in enumerate(tensor.placements):
        if placement.is_shard(0):
            # DTensor cuts as `torch.chunk` does: equal parts rounded up, so that the last ones may be empty.
            rows_per_rank = math.ceil(tensor.shape[0] / tensor.device_mesh.size(axis))
            rows = min(rows_per_rank * tensor.device_mesh.get_local_rank(axis), tensor.shape[0])
            return rows * math.prod(tensor.shape[1:])
        assert isinstance(placement, Replicate), "weights are cut along their first dim"

    return 0


def _rounded(values: Tensor, name: str, first: int) -> Tensor:
    """Round float32 values by chance. `first`: the position of the first one in the whole tensor `name`."""
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little", signed=True)
    flat = values.contiguous().view(-1)
    out = torch.empty(flat.shape, dtype=torch.bfloat16, device=flat.device)

    # In chunks: the hashes take several times the memory of the values.
    for start in range(0, len(flat), CHUNK_ELEMENTS):
        part = flat[start : start + CHUNK_ELEMENTS]
        bits = part.view(torch.int32) + _noise(first + start, len(part), seed, part.device)
        cut = (bits & ~LOW_BITS).view(torch.float32)
        # Infinity has no low bits, and noise in those of a NaN could carry over into its sign or exponent.
        out[start : start + len(part)] = torch.where(part.isfinite(), cut, part)

    return out.view(values.shape)


def _noise(first: int, count: int, seed: int, device: torch.device) -> Tensor:
    """Return the `LOW_BITS` of the hash of each number from `first` on.

    Source: the finaliser of MurmurHash3, 32 bits. The constants are its own, as signed numbers.
    """
    x = torch.arange(first, first + count, device=device).to(torch.int32) * -1640531535 + seed
    x ^= (x >> 16) & LOW_BITS
    x *= -2048144789
    x ^= (x >> 13) & 0x7FFFF
    x *= -1028477387
    x ^= (x >> 16) & LOW_BITS
    return x & LOW_BITS

"""The mesh of a run: data ranks times sequence ranks."""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from apollo_sft.errors import TopologyError
from apollo_sft.parallel.launch import World


@dataclass(frozen=True, slots=True)
class Mesh:
    """`shard`: the flat mesh over which parameters are sharded, all ranks; None without a process group.

    `sp_group`: the ranks that share a sequence; None when each has its own.
    """

    dp_rank: int
    dp_size: int
    sp_rank: int
    sp_size: int
    shard: DeviceMesh | None
    sp_group: dist.ProcessGroup | None = None


def build_mesh(world: World, sp_size: int) -> Mesh:
    """Ranks of one sequence group are neighbours. Raises: TopologyError when `sp_size` does not divide the ranks."""
    if world.size % sp_size:
        raise TopologyError(
            "ulysses_sequence_parallel_size does not divide the number of processes",
            found=f"{world.size} processes, sequence parallel size {sp_size}",
            expected=f"a multiple of {sp_size} processes",
        )
    dp_size = world.size // sp_size
    dp_rank, sp_rank = divmod(world.rank, sp_size)
    if not dist.is_initialized():
        return Mesh(dp_rank, dp_size, sp_rank, sp_size, None)
    mesh = init_device_mesh(world.device.type, (dp_size, sp_size), mesh_dim_names=("dp", "sp"))
    sp_group = mesh["sp"].get_group() if sp_size > 1 else None
    return Mesh(dp_rank, dp_size, sp_rank, sp_size, mesh["dp", "sp"]._flatten("shard"), sp_group)

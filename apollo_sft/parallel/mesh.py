"""The mesh of a run: data ranks times sequence ranks."""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from apollo_sft.errors import TopologyError
from apollo_sft.parallel.launch import World


@dataclass(frozen=True, slots=True)
class Mesh:
    """The place of this rank in the mesh, and the groups of ranks that it belongs to."""

    dp_rank: int
    dp_size: int
    sp_rank: int
    sp_size: int
    shard: DeviceMesh | None
    """The mesh over which parameters are sharded; None without a process group. With one axis, all ranks share one copy
    of the parameters. With two, each row of ranks shares one, and the copies are replicated over the rows."""
    sp_group: dist.ProcessGroup | None = None
    """The ranks that share a sequence; None when each has its own."""


def build_mesh(world: World, sp_size: int, fsdp_size: int = -1) -> Mesh:
    """Build the mesh. Ranks of one sequence group, and ranks that share one copy of the weights, are neighbours.

    Eight ranks with sp_size=2 and fsdp_size=4, for example: the pairs (0 1) (2 3) (4 5) (6 7) share a sequence each;
    (0 1 2 3) share one copy of the weights and (4 5 6 7) another.
    Raises: TopologyError as `check_mesh`.
    """
    check_mesh(world.size, sp_size, fsdp_size)
    dp_size = world.size // sp_size
    dp_rank, sp_rank = divmod(world.rank, sp_size)
    if not dist.is_initialized():
        return Mesh(dp_rank, dp_size, sp_rank, sp_size, None)

    mesh = init_device_mesh(world.device.type, (dp_size, sp_size), mesh_dim_names=("dp", "sp"))
    sp_group = None
    if sp_size > 1:
        sp_group = mesh["sp"].get_group()

    # Gradients are summed over all ranks, those of one sequence included: each has seen a part of its tokens.
    shard = mesh["dp", "sp"]._flatten("shard")
    if fsdp_size not in (-1, world.size):
        rows = world.size // fsdp_size
        shard = init_device_mesh(world.device.type, (rows, fsdp_size), mesh_dim_names=("replicate", "shard"))

    return Mesh(dp_rank, dp_size, sp_rank, sp_size, shard, sp_group)


def check_mesh(processes: int, sp_size: int, fsdp_size: int) -> None:
    """Raise a TopologyError when a size does not divide the number of processes."""
    sizes = {"ulysses_sequence_parallel_size": sp_size, "model.fsdp_config.fsdp_size": fsdp_size}
    for key, size in sizes.items():
        if size != -1 and processes % size:
            raise TopologyError(
                f"{key} does not divide the number of processes",
                found=f"{processes} processes, {key}={size}",
                expected=f"a multiple of {size} processes",
            )

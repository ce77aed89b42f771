"""Data ranks and sequence ranks, by arithmetic alone: no process group is started."""

import pytest
import torch

from apollo_sft.errors import TopologyError
from apollo_sft.parallel.launch import World
from apollo_sft.parallel.mesh import build_mesh, check_mesh


def test_one_process_has_no_mesh() -> None:
    mesh = build_mesh(World(0, 1, 0, torch.device("cpu")), 1)
    assert (mesh.dp_rank, mesh.dp_size, mesh.sp_rank, mesh.sp_size) == (0, 1, 0, 1)
    assert mesh.shard is mesh.sp_group is None


@pytest.mark.parametrize("sp_size", [1, 2, 4, 8])
def test_sequence_ranks_are_neighbours(sp_size: int) -> None:
    meshes = [build_mesh(World(rank, 8, rank, torch.device("cpu")), sp_size) for rank in range(8)]
    assert [(mesh.dp_rank, mesh.sp_rank) for mesh in meshes] == [divmod(rank, sp_size) for rank in range(8)]
    assert {mesh.dp_size for mesh in meshes} == {8 // sp_size}


@pytest.mark.parametrize("processes", [1, 2, 6])
def test_sizes_that_divide(processes: int) -> None:
    check_mesh(processes, 1, -1)
    check_mesh(processes, processes, processes)


@pytest.mark.parametrize(
    ("processes", "sp_size", "fsdp_size", "key"),
    [
        (6, 4, -1, "ulysses_sequence_parallel_size"),
        (1, 2, -1, "ulysses_sequence_parallel_size"),
        (6, 1, 4, "model.fsdp_config.fsdp_size"),
        (2, 2, 4, "model.fsdp_config.fsdp_size"),
    ],
)
def test_sizes_that_do_not_divide(processes: int, sp_size: int, fsdp_size: int, key: str) -> None:
    with pytest.raises(TopologyError, match=f"^{key} does not divide the number of processes"):
        check_mesh(processes, sp_size, fsdp_size)

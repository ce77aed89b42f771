"""The processes of a run: who I am, which device is mine, and the process group when there is more than one."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from apollo_sft.errors import ApolloError, TopologyError

T = TypeVar("T")
WAIT = timedelta(days=7)
"""How long ranks wait for the one that prepares: its length is the data's, and torchrun ends all when it fails."""


@dataclass(frozen=True, slots=True)
class World:
    """`rank` and `size` count all processes of the run, `local_rank` those of this host."""

    rank: int
    size: int
    local_rank: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def start(device: str, needs_group: bool) -> World:
    """Read torchrun's environment, choose the device, start the process group.

    One process has no group unless `needs_group` (sharding wants one even for a single rank).
    Raises: TopologyError when a rank has no device of its own.
    """
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    world = World(rank, size, local_rank, _device(device, local_rank))
    if world.device.type == "cuda":
        torch.cuda.set_device(world.device)
    if size > 1:
        dist.init_process_group("cpu:gloo,cuda:nccl" if world.device.type == "cuda" else "gloo")
    elif needs_group:
        backend = "nccl" if world.device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    return world


def _device(wanted: str, local_rank: int) -> torch.device:
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    count = torch.cuda.device_count()
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if processes > count:
        raise TopologyError(
            "more processes on this host than GPUs",
            found=f"{processes} processes, {count} GPUs",
            expected="at most one process per GPU",
            fix="lower --nproc_per_node, or trainer.device=cpu",
        )
    return torch.device("cuda", local_rank)


def on_main(world: World, name: str, work: Callable[[], T]) -> T | None:
    """Run `work` on rank 0 and give its result there, None elsewhere. `name` is used once in a run.

    When it fails the other ranks stop in silence with its exit code: rank 0 speaks for all.
    """
    if world.is_main:
        return _lead(world, f"main/{name}", work)
    _follow(f"main/{name}")
    return None


def once_per_host(world: World, name: str, work: Callable[[], T]) -> T:
    """Run `work` on one process of each host, then on the others, which find what the first one left on disk."""
    key = f"host-{os.environ.get('GROUP_RANK', '0')}/{name}"
    if world.local_rank == 0:
        return _lead(world, key, work)
    _follow(key)
    return work()


def _lead(world: World, key: str, work: Callable[[], T]) -> T:
    """Work, and leave a verdict for those who wait at the rendezvous store."""
    try:
        result = work()
    except ApolloError as error:
        if world.size > 1:
            _store().set(key, str(error.exit_code))
        raise
    if world.size > 1:
        _store().set(key, "ready")
    return result


def _follow(key: str) -> None:
    """Wait at the store, not in a collective: no timeout ends a long preparation."""
    _store().wait([key], WAIT)
    verdict = _store().get(key).decode()
    if verdict != "ready":
        raise SystemExit(int(verdict))


def _store() -> Any:
    return dist.distributed_c10d._get_default_store()


def stop() -> None:
    """Leave the process group. Objects that hold sub-groups must be gone by now: gloo aborts at exit otherwise."""
    if dist.is_initialized():
        dist.destroy_process_group()

"""The processes of a run: who I am, which device is mine, and the process group when there is more than one."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from apollo_sft.errors import ApolloError, TopologyError

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
    if local_rank >= count:
        raise TopologyError(
            "more processes on this host than GPUs",
            found=f"local rank {local_rank}, {count} GPUs",
            expected="at most one process per GPU",
            fix="lower --nproc_per_node, or trainer.device=cpu",
        )
    return torch.device("cuda", local_rank)


def main_first(world: World, work: Callable[[], None]) -> None:
    """Run `work` on one process of each host, then on the others, which find what the first one left.

    The others wait at the rendezvous store, not in a collective: no timeout ends a long preparation. When the first
    one fails the others stop in silence with its exit code; it speaks for all.
    """
    if world.size == 1:
        work()
        return
    store = dist.distributed_c10d._get_default_store()
    key = f"apollo/prepared/{os.environ.get('GROUP_RANK', '0')}"
    if world.local_rank == 0:
        try:
            work()
        except ApolloError as error:
            store.set(key, str(error.exit_code))
            raise
        store.set(key, "ready")
        return
    store.wait([key], WAIT)
    verdict = store.get(key).decode()
    if verdict != "ready":
        raise SystemExit(int(verdict))
    work()


def stop() -> None:
    """Leave the process group. Objects that hold sub-groups must be gone by now: gloo aborts at exit otherwise."""
    if dist.is_initialized():
        dist.destroy_process_group()

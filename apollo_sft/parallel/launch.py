"""The processes of a run: who I am, which device is mine, and the process group when there is more than one."""

from __future__ import annotations

import os
import secrets
import socket
import time
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.constants import default_pg_timeout
from torch.distributed.rendezvous import rendezvous

from apollo_sft.errors import TopologyError
from apollo_sft.parallel.place import Place, read_place
from apollo_sft.parallel.rendezvous import POLL_SECONDS, READY, rendezvous_store, wait_for


@dataclass(frozen=True, slots=True)
class World:
    """`rank` and `size` count all processes of the run, `local_rank` those of this host. `host` is its identity."""

    rank: int
    size: int
    local_rank: int
    device: torch.device
    host: str = ""
    num_hosts: int = 1

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def start(device: str, needs_group: bool, timeout_seconds: float | None = None) -> World:
    """Read the environment, choose the device, start the process group, find out how many hosts there are.

    One process has no group unless `needs_group` (sharding wants one even for a single rank). `timeout_seconds`: the
    longest that a rank waits for the others in a collective; None is torch's own.
    Raises: TopologyError when the environment is incomplete, or a rank has no device of its own.
    """
    place = read_place(os.environ)
    os.environ.update(place.variables)
    chosen = _device(device, place)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if place.size > 1:
        _join(place, "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo", timeout_seconds)
    elif needs_group:
        backend = "nccl" if chosen.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    num_hosts = _meet(place) if place.size > 1 else 1
    return World(place.rank, place.size, place.local_rank, chosen, place.host, num_hosts)


def _join(place: Place, backend: str, timeout_seconds: float | None) -> None:
    where = f"{place.variables['MASTER_ADDR']}:{place.variables['MASTER_PORT']}"
    try:
        timeout = timedelta(seconds=timeout_seconds) if timeout_seconds else default_pg_timeout
        store, rank, size = next(rendezvous("env://", timeout=timeout))
        store = dist.PrefixStore(_agreed_name(store, place), store)  # type: ignore[attr-defined]
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
    except dist.DistNetworkError as error:
        raise TopologyError(
            f"the processes of this run cannot meet at {where} (MASTER_ADDR:MASTER_PORT)",
            found=str(error).splitlines()[0],
            expected="an address of the host of rank 0 and a port that is free there",
            fix="another MASTER_PORT, or torchrun --standalone, which finds a free one",
        ) from error


def _agreed_name(store: Any, place: Place) -> str:
    """A new name for this start of the job, the same on all ranks.

    torchrun keeps its store when it starts the ranks again: what the earlier ones left there must not be taken for
    what the present ones say. So rank 0 answers every word that it finds, and waits for those who heard the answer.
    """
    name = secrets.token_hex(8)
    if place.rank:
        store.set(f"hello/{place.rank}", name)
        agreed = wait_for(f"welcome/{name}", store)
        store.add(f"here/{agreed}", 1)
        return agreed
    welcomed: set[str] = set()
    while store.add(f"here/{name}", 0) < place.size - 1:
        said = [key for key in (f"hello/{rank}" for rank in range(1, place.size)) if store.check([key])]
        for guest in {store.get(key).decode() for key in said} - welcomed:
            store.set(f"welcome/{guest}", name)
            welcomed.add(guest)
        time.sleep(POLL_SECONDS / 10)
    return name


def _device(wanted: str, place: Place) -> torch.device:
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if place.local_size is None and count == 1:
        return torch.device("cuda", 0)  # srun and Kubernetes may show each process its own GPU only
    processes = place.local_size or place.local_rank + 1
    if processes > count:
        raise TopologyError(
            "more processes on this host than GPUs",
            found=f"{processes} processes, {count} GPUs on {socket.gethostname()}",
            expected="at most one process per GPU",
            fix="start fewer processes on each host, or trainer.device=cpu",
        )
    return torch.device("cuda", place.local_rank)


def _meet(place: Place) -> int:
    """The number of hosts, once every process has said where it is.

    Raises: TopologyError on rank 0 when two processes took the same place: they would share a GPU.
    """
    store = rendezvous_store()
    if store.add(f"place/{place.host}", 1) == 1:
        store.add("place/hosts", 1)
    if store.add(f"place/{place.host}/{place.local_rank}", 1) > 1:
        store.set("place/all", f"{socket.gethostname()}: two processes with LOCAL_RANK={place.local_rank}")
    elif store.add("place/arrived", 1) == place.size:
        store.set("place/all", READY)
    verdict = wait_for("place/all")
    if verdict == READY:
        return int(store.add("place/hosts", 0))
    if place.rank:
        raise SystemExit(TopologyError.exit_code)
    raise TopologyError(
        "two processes say that they are the same one of a host",
        found=verdict,
        expected="LOCAL_RANK counts the processes of each host from 0",
        fix="set LOCAL_RANK for every process, or start by torchrun",
    )


def stop() -> None:
    """Leave the process group. Objects that hold sub-groups must be gone by now: gloo aborts at exit otherwise."""
    if dist.is_initialized():
        dist.destroy_process_group()

"""Start the processes of a run: rank and device of this one, and the process group when there are several."""

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
    """The processes of a run, and the place of this one among them."""

    rank: int
    size: int
    """Number of all processes of the run."""
    local_rank: int
    """The rank among the processes of this host."""
    device: torch.device
    host: str = ""
    """A name that no other host has."""
    num_hosts: int = 1

    @property
    def is_main(self) -> bool:
        """Return whether this process is rank 0."""
        return self.rank == 0


def start(device: str, needs_group: bool, timeout_seconds: float | None = None) -> World:
    """Read the environment, choose the device, start the process group, and count the hosts.

    One process has no group unless `needs_group` (sharding wants one even for a single rank). `timeout_seconds`: the
    longest that a rank waits for the others in a collective; None is torch's own.
    Raises: TopologyError when the environment is incomplete, or a rank has no device of its own.
    """
    place = read_place(os.environ)
    os.environ.update(place.variables)
    chosen = _device(device, place)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)

    num_hosts = 1
    if place.size > 1:
        # With GPUs, gloo serves CPU tensors beside it: flags of ranks must not wait for kernels.
        backend = "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo"
        _join(place, backend, timeout_seconds)
        num_hosts = _count_hosts(place)
    elif needs_group:
        backend = "nccl" if chosen.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]

    return World(place.rank, place.size, place.local_rank, chosen, place.host, num_hosts)


def _join(place: Place, backend: str, timeout_seconds: float | None) -> None:
    """Start the process group. Raises: TopologyError when the address of the rendezvous cannot be used."""
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
    """Return a new name for this start of the job, the same on all ranks: the prefix of all keys in the store.

    torchrun keeps its store when it restarts the ranks: keys of the earlier ones must not be taken for keys of the
    present ones. A rank writes a random number under `hello/RANK`, which may overwrite one of an earlier start. Rank 0
    answers every number that it finds there, old ones too, by the name of this start, and waits until size - 1 ranks
    have confirmed that name: only the present ranks can.
    """
    name = secrets.token_hex(8)
    if place.rank:
        store.set(f"hello/{place.rank}", name)
        agreed = wait_for(f"welcome/{name}", store)
        store.add(f"here/{agreed}", 1)
        return agreed

    answered: set[str] = set()
    greetings = [f"hello/{rank}" for rank in range(1, place.size)]
    while store.add(f"here/{name}", 0) < place.size - 1:
        found = {store.get(key).decode() for key in greetings if store.check([key])}
        for number in found - answered:
            store.set(f"welcome/{number}", name)
            answered.add(number)
        time.sleep(POLL_SECONDS / 10)

    return name


def _device(wanted: str, place: Place) -> torch.device:
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")

    # srun and Kubernetes may let each process see its own GPU only.
    count = torch.cuda.device_count()
    if place.local_size is None and count == 1:
        return torch.device("cuda", 0)

    processes = place.local_size or place.local_rank + 1
    if processes > count:
        raise TopologyError(
            "more processes on this host than GPUs",
            found=f"{processes} processes, {count} GPUs on {socket.gethostname()}",
            expected="at most one process per GPU",
            fix="start fewer processes on each host, or trainer.device=cpu",
        )
    return torch.device("cuda", place.local_rank)


def _count_hosts(place: Place) -> int:
    """Return the number of hosts, once every process has reported its place.

    Raises: TopologyError on rank 0 when two processes have the same place: they would share a GPU.
    """
    store = rendezvous_store()
    if store.add(f"place/{place.host}", 1) == 1:
        store.add("place/hosts", 1)

    # The last process to arrive ends the wait of all, and so does the first one that finds its place taken.
    if store.add(f"place/{place.host}/{place.local_rank}", 1) > 1:
        store.set("place/all", f"{socket.gethostname()}: two processes with LOCAL_RANK={place.local_rank}")
    elif store.add("place/arrived", 1) == place.size:
        store.set("place/all", READY)

    verdict = wait_for("place/all")
    if verdict == READY:
        return int(store.add("place/hosts", 0))
    if place.rank:
        raise SystemExit(TopologyError.exit_code)  # silently: rank 0 reports

    raise TopologyError(
        "two processes on one host report the same LOCAL_RANK",
        found=verdict,
        expected="LOCAL_RANK counts the processes of each host from 0",
        fix="set LOCAL_RANK for every process, or start by torchrun",
    )


def stop() -> None:
    """Leave the process group. Objects that hold sub-groups must be freed by now: gloo aborts at exit otherwise."""
    if dist.is_initialized():
        dist.destroy_process_group()

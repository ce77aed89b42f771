"""All ranks decide alike: every way in which they learn of each other what to do.

==================  =====================================  ===============  ==========================================
function            what every rank learns                 by               when a rank fails or objects
==================  =====================================  ===============  ==========================================
`on_main`           rank 0 has done its work               store            the others exit silently with its code
`once_per_host`     every host has done its work           store            the others exit silently with its code
`must_agree`        all ranks have the same facts          store            ConfigError on rank 0, naming the ranks
`object_to` (1)     no rank objects to what rank 0 says    store            rank 0 raises, the others exit silently
`raise_on_all`      no rank has failed                     all_reduce       every rank raises
`any_rank`          a flag is set on some rank             all_reduce, CPU
`from_main`         a value of rank 0                      broadcast
`Vote`              flags of all ranks, with each step     all_gather of the step's metrics (`train/step.py`)
==================  =====================================  ===============  ==========================================

(1) with `collect_objections` on rank 0.

The rendezvous store serves before training: work there may take hours, and no collective may wait that long. A name
that is given to a function of the store is used once in a run. Collectives serve during training.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Mapping
from enum import IntFlag
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from apollo_sft.errors import ApolloError, CheckpointError, ConfigError, Stopped, TopologyError
from apollo_sft.parallel.launch import World
from apollo_sft.parallel.rendezvous import READY, rendezvous_store, wait_for

T = TypeVar("T")
FAILED = "1"
"""The verdict about work that ended in an error without an exit code of its own."""

MOST_NAMED = 4
"""Ranks, or differences, that a message names; the others are counted."""

LONGEST_VALUE = 80
DIGEST_LENGTH = 16


class Vote(IntFlag):
    """Flags of one rank, sent to all others with each step: what one rank sets holds for all."""

    NOTHING = 0

    STOP = 1
    """A signal asked for the end."""

    SAVE_FAILED = 2
    """A save in the background failed."""

    SAVE_DUE = 4
    """Enough minutes have passed since the last save."""


def on_main(world: World, name: str, work: Callable[[], T]) -> T | None:
    """Run `work` on rank 0 and return its result there, None elsewhere.

    When it fails, rank 0 raises and the other ranks exit silently with its exit code.
    """
    if world.is_main:
        return _lead(world, f"main/{name}", work)
    _follow(f"main/{name}")
    return None


def once_per_host(world: World, name: str, work: Callable[[], T]) -> T:
    """Run `work` on one process of each host, then on the others, which find what the first one left on disk.

    No rank goes on before every host is done, so that no collective has to wait for a slow or failed host.
    """
    key = f"host/{world.host}/{name}"

    if world.local_rank == 0:
        result = _lead(world, key, work, all_hosts=f"hosts/{name}")
    else:
        _follow(key)
        result = work()

    if world.size > 1:
        _follow(f"hosts/{name}")
    return result


def must_agree(world: World, name: str, mine: Mapping[str, Any]) -> None:
    """Refuse the run unless every rank has the facts that rank 0 has. Every rank calls it.

    Raises: ConfigError on rank 0, which names what differs and where; the others exit silently.
    """
    if world.size == 1:
        return
    if not world.is_main:
        object_to(world, name, lambda theirs: _differences(json.loads(theirs), mine, world))
        return

    objections = collect_objections(name, json.dumps(mine, default=str))
    if objections:
        raise ConfigError(
            "not every process was started with the same command, versions and data",
            found=named(objections),
            expected="the same on all hosts",
            fix="start the same command everywhere, with the same packages and the same files",
        )


def collect_objections(name: str, text: str) -> list[str]:
    """On rank 0: send `text` to all other ranks, which call `object_to`; return what they object.

    For two ranks or more.
    """
    store = rendezvous_store()
    store.set(f"objections/{name}", "")
    store.set(f"asked/{name}", text)
    wait_for(f"answered/{name}")

    objections = store.get(f"objections/{name}").decode().splitlines()
    store.set(f"verdict/{name}", str(TopologyError.exit_code) if objections else READY)
    return [str(line) for line in objections]


def object_to(world: World, name: str, judge: Callable[[str], str | None]) -> None:
    """Off rank 0: judge the text of rank 0. `judge` returns None, or one line that says what is wrong.

    Ends this process silently when any rank objects.
    """
    store = rendezvous_store()
    objection = judge(wait_for(f"asked/{name}"))

    if objection is not None:
        store.append(f"objections/{name}", objection + "\n")
    if store.add(f"answers/{name}", 1) == world.size - 1:
        store.set(f"answered/{name}", READY)
    _follow(f"verdict/{name}")


def named(objections: list[str]) -> str:
    """Return the first objections in one line, with the number of the others."""
    shown = objections[:MOST_NAMED]
    if len(objections) > MOST_NAMED:
        shown.append(f"and {len(objections) - MOST_NAMED} more ranks")
    return "; ".join(shown)


def attempt(action: Callable[[], object]) -> Exception | None:
    """Run `action` and return its error, for `raise_on_all` to raise once every rank is there to learn of it."""
    try:
        action()
    except Exception as error:
        return error
    return None


def raise_on_all(failure: Exception | None, model: Any = None, group: Any = None) -> None:
    """Raise on every rank when one has failed: there what it met, elsewhere that another rank failed.

    Collective over `group` (gloo) where one is given, else over all ranks, on the device of `model`.
    Raises: CheckpointError, or the ApolloError that this rank met.
    """
    failed = failure is not None

    if dist.is_available() and dist.is_initialized():
        device = torch.device("cpu") if model is None else next(model.parameters()).device
        flag = torch.tensor(int(failed), device=device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=group)
        failed = bool(flag.item())

    if isinstance(failure, ApolloError):
        raise failure
    if failure is not None:
        raise CheckpointError("the model could not be written", found=repr(failure)) from failure
    if failed:
        raise CheckpointError("the model was not saved: the rank that writes it failed and says why")


def any_rank(flag: bool, world: World) -> bool:
    """Return whether the flag is set on some rank. Collective, on the CPU: it waits for no kernel of a GPU."""
    if world.size == 1:
        return flag
    shared = torch.tensor(int(flag))
    dist.all_reduce(shared, op=dist.ReduceOp.MAX)
    return bool(shared)


def from_main(value: T, world: World) -> T:
    """Return the value that rank 0 has, on every rank. Collective."""
    if world.size == 1:
        return value
    shared = [value]
    dist.broadcast_object_list(shared, src=0)
    return shared[0]


def sum_over_ranks(values: Tensor) -> Tensor:
    """Sum element by element over all ranks, in place; return `values`. Does nothing without a process group."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def _lead(world: World, key: str, work: Callable[[], T], all_hosts: str | None = None) -> T:
    """Work, then leave a verdict at `key` for the ranks that wait; at `all_hosts` once all hosts are done."""
    if world.size == 1:
        return work()

    store = rendezvous_store()
    verdict = FAILED
    try:
        result = work()
        verdict = READY
    except (ApolloError, Stopped) as error:
        verdict = str(error.exit_code)
        raise
    finally:
        store.set(key, verdict)
        # A failure is told at once; success only by the host that is the last to finish.
        if all_hosts and (verdict != READY or store.add(f"{all_hosts}/done", 1) == world.num_hosts):
            store.set(all_hosts, verdict)
    return result


def _follow(key: str) -> None:
    """Wait for a verdict. Raises: SystemExit with the exit code of the rank that failed."""
    verdict = wait_for(key)
    if verdict != READY:
        raise SystemExit(int(verdict))


def _differences(theirs: Mapping[str, Any], mine: Mapping[str, Any], world: World) -> str | None:
    """Return one line that names what this rank has otherwise than rank 0; None when all is equal."""
    now = json.loads(json.dumps(mine, default=str))
    keys = [key for key in now if now[key] != theirs.get(key)]
    keys += [key for key in theirs if key not in now]
    if not keys:
        return None

    shown = ", ".join(f"{key} {_short(now.get(key))}, not {_short(theirs.get(key))}" for key in keys[:MOST_NAMED])
    more = f" and {len(keys) - MOST_NAMED} more" if len(keys) > MOST_NAMED else ""
    return f"rank {world.rank} on {socket.gethostname()} has {shown}{more}"


def _short(value: Any) -> str:
    """Return the value in one line; of a long one, such as a digest, only the start."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= LONGEST_VALUE else f"{text[:DIGEST_LENGTH]}…"

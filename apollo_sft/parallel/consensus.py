"""Functions by which all ranks decide alike: to continue, to stop, or to fail together.

Before training, through the rendezvous store. Work may take hours there, longer than any collective may wait. A `name`
that is passed to one of these functions is used once in a run.

    on_main               rank 0 works, the others wait
    once_per_host         one process of each host works, then the others of that host; all wait for all hosts
    must_agree            every rank compares its facts with those of rank 0
    collect_objections    on rank 0, with `object_to` on the others: every rank judges a text of rank 0

    When one fails or objects: the rank that failed, or rank 0 for objections, raises; the others exit silently with
    its exit code.

During training, by collectives, which fail after trainer.collective_timeout_seconds.

    raise_on_all          all_reduce: when a rank has failed, every rank raises
    any_rank              all_reduce on the CPU: is a flag set on some rank?
    from_main             broadcast of a value of rank 0
    sum_over_ranks        all_reduce of a tensor
    Vote                  flags that travel with the metrics of each step (`train/step.py`): no collective of their own
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
"""Number of ranks, or of differences, that a message names; the others are counted."""

LONGEST_VALUE = 80
DIGEST_LENGTH = 16


class Vote(IntFlag):
    """Flags of one rank, sent to all others with each step: a flag that one rank sets holds for all."""

    NOTHING = 0

    STOP = 1
    """A signal was received: the run is to end."""

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

    No rank returns before every host is done, so that no collective has to wait for a slow or failed host.
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

    # One text for all: each rank finds its own differences, so that the comparison takes no time on rank 0.
    objections = collect_objections(name, json.dumps(mine, default=str))
    if objections:
        raise ConfigError(
            "not every process was started with the same command, versions and data",
            found=named(objections),
            expected="the same on all hosts",
            fix="start the same command everywhere, with the same packages and the same files",
        )


def collect_objections(name: str, text: str) -> list[str]:
    """Send `text` from rank 0 to all other ranks, which call `object_to`. Return their objections.

    For two ranks or more.
    """
    store = rendezvous_store()
    store.set(f"objections/{name}", "")
    store.set(f"asked/{name}", text)
    wait_for(f"answered/{name}")

    objections = store.get(f"objections/{name}").decode().splitlines()
    verdict = str(TopologyError.exit_code) if objections else READY
    store.set(f"verdict/{name}", verdict)
    return [str(line) for line in objections]


def object_to(world: World, name: str, judge: Callable[[str], str | None]) -> None:
    """Judge the text of rank 0, on every other rank. `judge` returns None, or one line with what is wrong.

    End this process silently when any rank objects.
    """
    store = rendezvous_store()
    objection = judge(wait_for(f"asked/{name}"))

    # The objection comes before the count: rank 0 reads all objections as soon as the last rank is counted.
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
    """Run `action` and return its error, for `raise_on_all` to raise once every rank has come to it."""
    try:
        action()
    except Exception as error:
        return error
    return None


def raise_on_all(failure: Exception | None, model: Any = None, group: Any = None) -> None:
    """Raise on every rank when one has failed: its own error there, elsewhere that another rank failed.

    Collective over `group` (gloo) where one is given, else over all ranks, on the device of `model`.
    Raises: CheckpointError, or the ApolloError of this rank.
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
        raise CheckpointError("the model was not saved: the rank that writes it failed and reports why")


def any_rank(flag: bool, world: World) -> bool:
    """Return whether the flag is set on some rank. Collective, on the CPU: it waits for no kernel of a GPU."""
    if world.size == 1:
        return flag
    shared = torch.tensor(int(flag))
    dist.all_reduce(shared, op=dist.ReduceOp.MAX)
    return bool(shared)


def from_main(value: T, world: World) -> T:
    """Return the value of rank 0, on every rank. Collective."""
    if world.size == 1:
        return value
    shared = [value]
    dist.broadcast_object_list(shared, src=0)
    return shared[0]


def sum_over_ranks(values: Tensor) -> Tensor:
    """Sum element by element over all ranks, in place; return `values`. Do nothing without a process group."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def _lead(world: World, key: str, work: Callable[[], T], all_hosts: str | None = None) -> T:
    """Work, then write a verdict at `key` for the ranks that wait; at `all_hosts` once all hosts are done."""
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
        # A failure is reported at once; success only by the host that is the last to finish.
        if all_hosts and (verdict != READY or store.add(f"{all_hosts}/done", 1) == world.num_hosts):
            store.set(all_hosts, verdict)

    return result


def _follow(key: str) -> None:
    """Wait for a verdict. Raises: SystemExit with the exit code of the rank that failed."""
    verdict = wait_for(key)
    if verdict != READY:
        raise SystemExit(int(verdict))


def _differences(theirs: Mapping[str, Any], mine: Mapping[str, Any], world: World) -> str | None:
    """Return one line with the facts that differ from those of rank 0; None when all are equal."""
    # Through JSON, as the other side came: tuples have become lists there.
    now = json.loads(json.dumps(mine, default=str))
    keys = [key for key in now if now[key] != theirs.get(key)]
    keys += [key for key in theirs if key not in now]
    if not keys:
        return None

    shown = ", ".join(f"{key} {_short(now.get(key))}, not {_short(theirs.get(key))}" for key in keys[:MOST_NAMED])
    if len(keys) > MOST_NAMED:
        shown += f" and {len(keys) - MOST_NAMED} more"
    return f"rank {world.rank} on {socket.gethostname()} has {shown}"


def _short(value: Any) -> str:
    """Return the value in one line; of a long one, such as a digest, only the start."""
    text = json.dumps(value, ensure_ascii=False)
    if len(text) > LONGEST_VALUE:
        text = f"{text[:DIGEST_LENGTH]}…"
    return text

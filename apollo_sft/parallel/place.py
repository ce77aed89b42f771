"""Who this process is, from the environment of whatever started it: torchrun, srun, or a cluster's own variables.

No torch here: the environment is read before anything slow is imported.
"""

from __future__ import annotations

import itertools
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from apollo_sft.errors import TopologyError

PORTS = range(10_000, 30_000)
"""Ports for SLURM jobs: below those that Linux gives out by itself."""
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
NODELISTS = ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST")
EVERY_INTERFACE = ("0.0.0.0", "::", "[::]", "*")
SLURM = {"RANK": "SLURM_PROCID", "WORLD_SIZE": "SLURM_NTASKS", "LOCAL_RANK": "SLURM_LOCALID"}
"""Our names of what srun calls otherwise."""


@dataclass(frozen=True, slots=True)
class Place:
    """`host` tells this machine, or this torchrun agent, from the others. `local_size` is None when nothing says it.

    `variables`: what torch's rendezvous and the user's own modules expect in the environment of several processes.
    """

    rank: int
    size: int
    local_rank: int
    local_size: int | None
    host: str
    starter: str
    variables: Mapping[str, str]


def read_place(environ: Mapping[str, str]) -> Place:
    """torchrun's and Kubernetes' names first; what they leave open is taken from srun's; nothing set is one process.

    Raises: TopologyError naming the variable that is missing or makes no sense.
    """
    by_slurm = _in_slurm_step(environ)
    found = {name: environ.get(name) or (by_slurm and environ.get(SLURM[name])) or None for name in SLURM}
    if not any(found.values()):
        found = {"RANK": "0", "WORLD_SIZE": "1"}
    for name in ("RANK", "WORLD_SIZE"):
        if not found[name]:
            there = ", ".join(f"{key}={value}" for key, value in found.items() if value)
            raise TopologyError(f"the environment variable {name} is not set", found=there, fix=_ALL_OR_NONE)
    numbers = {name: _number(environ, name, value or "0") for name, value in found.items()}
    rank, size, local_rank = numbers["RANK"], numbers["WORLD_SIZE"], numbers.get("LOCAL_RANK", 0)
    if rank >= size:
        raise TopologyError("RANK is not below WORLD_SIZE", found=f"RANK={rank}, WORLD_SIZE={size}", fix=_ALL_OR_NONE)
    _check_agreement(environ, size, by_slurm)
    given = environ.get("LOCAL_WORLD_SIZE")
    local_size = _number(environ, "LOCAL_WORLD_SIZE", given) if given else None
    group = environ.get("GROUP_RANK") or (environ.get("SLURM_NODEID", "") if by_slurm else "")
    variables = {}
    if size > 1:
        variables = {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(local_rank)}
        variables |= _rendezvous(environ, by_slurm)
        if local_size == size and variables["MASTER_ADDR"] in EVERY_INTERFACE:
            raise TopologyError(
                "the processes of one host would meet at an address that other hosts can reach",
                found=f"MASTER_ADDR={variables['MASTER_ADDR']}",
                expected="127.0.0.1: whoever reaches the rendezvous can take part in the run",
                fix="MASTER_ADDR=127.0.0.1, or torchrun --standalone",
            )
    if group:
        variables["GROUP_RANK"] = group
    return Place(rank, size, local_rank, local_size, _host(group), _starter(environ, by_slurm), variables)


_ALL_OR_NONE = "start by torchrun or srun, or set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT"


def expand_nodelist(text: str) -> list[str]:
    """SLURM's short form, written out: `node[003-005,9],gpu1` is node003, node004, node005, node9, gpu1.

    A name may hold several brackets. Raises: ValueError for what is not such a list.
    """
    if not re.fullmatch(r"(?:[^\[\],\s]|\[[\d,-]+\])+(?:,(?:[^\[\],\s]|\[[\d,-]+\])+)*", text):
        raise ValueError(text)
    names = []
    for entry in re.findall(r"(?:[^\[\],]|\[[^\]]*\])+", text):
        parts = re.split(r"\[([^\]]*)\]", entry)  # plain, inside of brackets, plain, …
        choices = [_numbers(part) if at % 2 else [part] for at, part in enumerate(parts)]
        names += ["".join(name) for name in itertools.product(*choices)]
    return names


def _numbers(text: str) -> list[str]:
    """`003-005,9` as 003, 004, 005, 9: as wide as the first of a range is written."""
    numbers = []
    for part in text.split(","):
        first, dash, last = part.partition("-")
        last = last if dash else first
        if not (first.isdecimal() and last.isdecimal() and int(first) <= int(last)):
            raise ValueError(part)
        numbers += [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
    return numbers


def _in_slurm_step(environ: Mapping[str, str]) -> bool:
    """torchrun in a SLURM job has said everything itself; a job of one task is one process."""
    if environ.get("RANK") and environ.get("WORLD_SIZE"):
        return False
    return "SLURM_PROCID" in environ and environ.get("SLURM_NTASKS", "1") != "1"


def _check_agreement(environ: Mapping[str, str], size: int, by_slurm: bool) -> None:
    """A job script may export some of the names itself; they must not contradict srun."""
    if by_slurm and size != _number(environ, "SLURM_NTASKS", environ.get("SLURM_NTASKS", "1")):
        raise TopologyError(
            "WORLD_SIZE is not the number of processes that srun started",
            found=f"WORLD_SIZE={size}, SLURM_NTASKS={environ.get('SLURM_NTASKS')}",
            fix="leave WORLD_SIZE out of the job script",
        )


def _number(environ: Mapping[str, str], name: str, value: str) -> int:
    if not value.isdecimal() or (name == "WORLD_SIZE" and int(value) < 1):
        shown = name if environ.get(name) else SLURM.get(name, name)
        raise TopologyError(f"the environment variable {shown} is not a number", found=repr(value))
    return int(value)


def _rendezvous(environ: Mapping[str, str], by_slurm: bool) -> dict[str, str]:
    """Where rank 0 listens. Under srun: the first host of the step, and a port that follows from the job."""
    address, port = environ.get("MASTER_ADDR"), environ.get("MASTER_PORT")
    if by_slurm and not address:
        address = _first_host(environ)
    if by_slurm and not port:
        job, step = environ.get("SLURM_JOB_ID", ""), environ.get("SLURM_STEP_ID", "")
        if job.isdecimal():
            number = int(job) + (int(step) if step.isdecimal() else 0)
            port = str(PORTS[number % len(PORTS)])
    for name, value in (("MASTER_ADDR", address), ("MASTER_PORT", port)):
        if not value:
            raise TopologyError(
                f"the environment variable {name} is not set",
                found=f"WORLD_SIZE={environ.get('WORLD_SIZE') or environ.get('SLURM_NTASKS')}",
                expected="the address and the port at which rank 0 can be reached",
                fix=_ALL_OR_NONE,
            )
    return {"MASTER_ADDR": str(address), "MASTER_PORT": str(port)}


def _first_host(environ: Mapping[str, str]) -> str | None:
    name = next((name for name in NODELISTS if environ.get(name)), None)
    if name is None:
        return None
    try:
        return expand_nodelist(environ[name])[0]
    except ValueError as error:
        raise TopologyError(
            f"the environment variable {name} cannot be read",
            found=environ[name],
            expected="a list such as node[003-005,9],gpu1",
            fix="set MASTER_ADDR to the host of rank 0",
        ) from error


def _host(group: str) -> str:
    """Containers may share a name on two machines, and one machine may run two agents."""
    boot = BOOT_ID.read_text().strip()[:8] if BOOT_ID.is_file() else ""
    return "/".join((socket.gethostname(), boot, group))


def _starter(environ: Mapping[str, str], by_slurm: bool) -> str:
    if by_slurm:
        return "srun"
    return "torchrun" if "TORCHELASTIC_RUN_ID" in environ else "this cluster"

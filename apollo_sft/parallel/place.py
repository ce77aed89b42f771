"""The place of this process in the run, from the environment that torchrun, srun or a cluster has set.

No torch here: the environment is read before anything slow is imported.
"""

from __future__ import annotations

import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from apollo_sft.errors import TopologyError

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
EVERY_INTERFACE = ("0.0.0.0", "::", "[::]", "*")
SLURM = {"RANK": "SLURM_PROCID", "WORLD_SIZE": "SLURM_NTASKS", "LOCAL_RANK": "SLURM_LOCALID"}
"""srun's names of the three numbers that torchrun calls so."""
ALL_OR_NONE = "start by torchrun or srun, or set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT"


@dataclass(frozen=True, slots=True)
class Place:
    """The place of one process."""

    rank: int
    size: int
    local_rank: int
    local_size: int | None
    """Number of processes on this host; None when no variable has it."""
    host: str
    """A name that this machine, or this torchrun agent on it, shares with no other."""
    starter: str
    """What started the process, in words."""
    variables: Mapping[str, str]
    """What torch's rendezvous and the user's own modules expect in the environment of several processes."""


def read_place(environ: Mapping[str, str]) -> Place:
    """Read the variables of torchrun and Kubernetes, then those of srun for what they leave open. None: one process.

    Raises: TopologyError naming the variable that is missing or makes no sense.
    """
    in_slurm = _in_slurm_step(environ)
    rank, size, local_rank = _read_numbers(environ, in_slurm)
    if rank >= size:
        raise TopologyError("RANK is not below WORLD_SIZE", found=f"RANK={rank}, WORLD_SIZE={size}", fix=ALL_OR_NONE)

    if in_slurm:
        _check_agreement(environ, size)

    local_size: int | None = None
    if environ.get("LOCAL_WORLD_SIZE"):
        local_size = _number("LOCAL_WORLD_SIZE", environ["LOCAL_WORLD_SIZE"])

    group = environ.get("GROUP_RANK", "")
    if in_slurm and not group:
        group = environ.get("SLURM_NODEID", "")

    # One process has no rendezvous. Its environment stays as it is, for programs that the training starts.
    variables = {}
    if size > 1:
        variables = {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(local_rank)}
        variables |= _rendezvous(environ, in_slurm)
        if local_size == size and variables["MASTER_ADDR"] in EVERY_INTERFACE:
            raise TopologyError(
                "the processes of one host would meet at an address that other hosts can reach",
                found=f"MASTER_ADDR={variables['MASTER_ADDR']}",
                expected="127.0.0.1: whoever reaches the rendezvous can take part in the run",
                fix="MASTER_ADDR=127.0.0.1, or torchrun --standalone",
            )

    if group:
        variables["GROUP_RANK"] = group

    return Place(rank, size, local_rank, local_size, _host(group), _starter(environ, in_slurm), variables)


def _read_numbers(environ: Mapping[str, str], in_slurm: bool) -> tuple[int, int, int]:
    """Return rank, number of processes, and rank on this host."""
    found: dict[str, str] = {}
    shown: dict[str, str] = {}
    for name, slurm_name in SLURM.items():
        shown[name] = name
        found[name] = environ.get(name, "")
        if in_slurm and not found[name]:
            shown[name] = slurm_name
            found[name] = environ.get(slurm_name, "")

    if not any(found.values()):
        return 0, 1, 0

    # With one variable missing, each process would take itself for the only one and train alone.
    for name in ("RANK", "WORLD_SIZE"):
        if not found[name]:
            there = ", ".join(f"{key}={value}" for key, value in found.items() if value)
            raise TopologyError(f"the environment variable {name} is not set", found=there, fix=ALL_OR_NONE)

    return (
        _number(shown["RANK"], found["RANK"]),
        _number(shown["WORLD_SIZE"], found["WORLD_SIZE"], least=1),
        _number(shown["LOCAL_RANK"], found["LOCAL_RANK"] or "0"),
    )


def _number(name: str, value: str, least: int = 0) -> int:
    if not value.isdecimal() or int(value) < least:
        raise TopologyError(f"the environment variable {name} is not a number", found=repr(value))
    return int(value)


def _in_slurm_step(environ: Mapping[str, str]) -> bool:
    """Return whether srun's variables are read: not under torchrun in a SLURM job, and not in a job of one task."""
    if environ.get("RANK") and environ.get("WORLD_SIZE"):
        return False
    return "SLURM_PROCID" in environ and environ.get("SLURM_NTASKS", "1") != "1"


def _check_agreement(environ: Mapping[str, str], size: int) -> None:
    """Raise a TopologyError when a job script exports a WORLD_SIZE that contradicts srun."""
    if size != _number("SLURM_NTASKS", environ.get("SLURM_NTASKS", "1")):
        raise TopologyError(
            "WORLD_SIZE is not the number of processes that srun started",
            found=f"WORLD_SIZE={size}, SLURM_NTASKS={environ.get('SLURM_NTASKS')}",
            fix="leave WORLD_SIZE out of the job script",
        )


def _rendezvous(environ: Mapping[str, str], in_slurm: bool) -> dict[str, str]:
    """Return the address and the port at which rank 0 listens."""
    address = environ.get("MASTER_ADDR")
    port = environ.get("MASTER_PORT")
    if in_slurm:
        from apollo_sft.parallel import slurm

        address = address or slurm.first_host(environ)
        port = port or slurm.job_port(environ)

    for name, value in (("MASTER_ADDR", address), ("MASTER_PORT", port)):
        if not value:
            raise TopologyError(
                f"the environment variable {name} is not set",
                found=f"WORLD_SIZE={environ.get('WORLD_SIZE') or environ.get('SLURM_NTASKS')}",
                expected="the address and the port at which rank 0 can be reached",
                fix=ALL_OR_NONE,
            )

    return {"MASTER_ADDR": str(address), "MASTER_PORT": str(port)}


def _host(group: str) -> str:
    """Return a unique name of the host: containers may share one on two machines, and a machine may run two agents."""
    boot = ""
    if BOOT_ID.is_file():
        boot = BOOT_ID.read_text().strip()[:8]
    return f"{socket.gethostname()}/{boot}/{group}"


def _starter(environ: Mapping[str, str], in_slurm: bool) -> str:
    if in_slurm:
        return "srun"
    if "TORCHELASTIC_RUN_ID" in environ:
        return "torchrun"
    return "this cluster"

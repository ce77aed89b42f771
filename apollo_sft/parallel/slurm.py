"""The rendezvous of a SLURM job step: the host of rank 0 from the list of nodes, and a port from the job's number.

Only read where srun has started the processes. No torch here.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping

from apollo_sft.errors import TopologyError

PORTS = range(10_000, 30_000)
"""Ports for SLURM jobs: below those that Linux assigns by itself."""
NODELISTS = ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST")
"""Variables with the hosts of the step, the best first: a step may use a part of the hosts of its job."""


def first_host(environ: Mapping[str, str]) -> str | None:
    """Return the host of rank 0: the first one of the step; None when SLURM names none.

    Raises: TopologyError for a list that cannot be read.
    """
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


def job_port(environ: Mapping[str, str]) -> str | None:
    """Return a port that all processes of a job step derive alike; None when SLURM names no job.

    It differs between the steps of a job, and mostly between jobs, which may share a host.
    """
    job = environ.get("SLURM_JOB_ID", "")
    if not job.isdecimal():
        return None

    number = int(job)
    step = environ.get("SLURM_STEP_ID", "")
    if step.isdecimal():
        number += int(step)
    return str(PORTS[number % len(PORTS)])


def expand_nodelist(text: str) -> list[str]:
    """Expand SLURM's short form: `node[003-005,9],gpu1` is node003, node004, node005, node9, gpu1.

    A name may have several brackets. Raises: ValueError for what is not such a list.
    """
    if not re.fullmatch(r"(?:[^\[\],\s]|\[[\d,-]+\])+(?:,(?:[^\[\],\s]|\[[\d,-]+\])+)*", text):
        raise ValueError(text)

    names = []
    for entry in re.findall(r"(?:[^\[\],]|\[[^\]]*\])+", text):
        # Parts alternate: plain text, the inside of a bracket, plain text, ... Every choice of numbers is a name.
        choices = []
        for at, part in enumerate(re.split(r"\[([^\]]*)\]", entry)):
            choices.append(_numbers(part) if at % 2 else [part])
        names += ["".join(name) for name in itertools.product(*choices)]
    return names


def _numbers(text: str) -> list[str]:
    """Expand `003-005,9` to 003, 004, 005, 9. The first number of a range sets the width of all."""
    numbers = []
    for part in text.split(","):
        first, dash, last = part.partition("-")
        if not dash:
            last = first
        if not (first.isdecimal() and last.isdecimal() and int(first) <= int(last)):
            raise ValueError(part)
        numbers += [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
    return numbers

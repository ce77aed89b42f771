"""`apollo-sft train`: check the command line, then start one process per GPU (or `--nproc N`) by torchrun."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType

from apollo_sft import __main__ as entry
from apollo_sft.checkpoint.run_folder.settle import settle_run
from apollo_sft.cli.job import compose_job
from apollo_sft.config.schema import TrainerConfig
from apollo_sft.errors import ConfigError, Preempted
from apollo_sft.train import signals

SIGNALS = (*signals.SIGNALS, signal.SIGHUP)


def main(arguments: list[str]) -> int:
    """Train. Return the exit code: 0 done, 1 failed, 2 refused, 75 stopped by a signal with the state saved.

    Raises: ConfigError, before torch is imported.
    """
    if "--help" in arguments or "-h" in arguments:
        arguments = ["--help"]

    nproc, overrides = _take_nproc(arguments)
    composed = compose_job(overrides)
    if composed is None:
        return 0

    processes = _num_processes(composed.config.trainer, nproc)
    if processes == 1:
        return entry.main(overrides)

    began = time.time()
    code = _torchrun(processes, overrides)
    return settle_run(Path(composed.config.trainer.default_local_dir), code, began)


def _take_nproc(arguments: list[str]) -> tuple[int | None, list[str]]:
    """Return the value of `--nproc`, which may be anywhere in the line, and the rest of it. Raises: ConfigError."""
    rest: list[str] = []
    value: str | None = None
    waiting = iter(arguments)
    for argument in waiting:
        if argument == "--nproc":
            value = next(waiting, "")
        elif argument.startswith("--nproc="):
            value = argument.partition("=")[2]
        else:
            rest.append(argument)

    if value is None:
        return None, rest
    if not value.isdecimal() or int(value) < 1:
        raise ConfigError("--nproc takes a number of processes", found=repr(value), expected="1 or more")
    return int(value), rest


def _num_processes(trainer: TrainerConfig, nproc: int | None) -> int:
    """Return the number of processes that is given, else one per GPU, else one.

    Raises: ConfigError when two different numbers are given.
    """
    wanted = trainer.n_gpus_per_node
    if nproc is not None and wanted is not None and nproc != wanted:
        raise ConfigError("--nproc and trainer.n_gpus_per_node differ", found=f"{nproc} and {wanted}")
    if nproc is not None or wanted is not None:
        return nproc or wanted or 1
    if trainer.device == "cpu":
        return 1

    import torch

    return max(1, torch.cuda.device_count())


def _torchrun(processes: int, overrides: list[str]) -> int:
    """Run torchrun, and return the exit code of the rank that failed first."""
    command = [sys.executable, "-m", "apollo_sft.cli.launcher", "--standalone", "--nnodes=1"]
    command += [f"--nproc_per_node={processes}", "-m", "apollo_sft", *overrides]
    environment = os.environ | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(_threads(processes)))}
    return run_passing_signals(command, environment)


def run_passing_signals(command: list[str], environment: dict[str, str]) -> int:
    """Run a command of ours, pass signals on to it, and return its exit code."""
    # In a session of its own: the terminal would send it Ctrl-C a second time.
    running = subprocess.Popen(command, env=environment, start_new_session=True)
    passed: list[int] = []

    def forward(number: int, frame: FrameType | None) -> None:
        del frame
        passed.append(number)
        running.send_signal(number)

    passed_on = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    previous = {number: signal.signal(number, forward) for number in passed_on}
    try:
        code = running.wait()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)

    if code >= 0:
        return code
    if -code in passed:  # its handlers were not installed yet: no rank had been started
        return Preempted.exit_code
    return 1


def _threads(processes: int) -> int:
    """Return the cores for each process: torchrun itself would give every process one."""
    return max(1, (os.cpu_count() or 1) // processes)

"""After a failure: which rank reports it to the user, and which ranks exit silently. No torch here."""

from __future__ import annotations

import os
import socket
import sys
import time
import traceback
from typing import NoReturn

from apollo_sft.errors import ApolloError, CheckpointError, Preempted, Stopped, TrainingError, message_of
from apollo_sft.redact import redact

LOST_PEER = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "failed to recv, got 0 bytes",
    "remote process exited",
    "communicator was aborted",
)
"""Parts of the messages of gloo, NCCL and the rendezvous store when another rank has ended."""

TIMED_OUT = "Timed out waiting"
"""A part of gloo's message when not all ranks came to a collective within trainer.collective_timeout_seconds."""

PATIENCE_SECONDS = 3
"""Delay of the exit of a silent rank after a failure: torchrun ends all ranks with the first that exits, and the rank
that reports must have done so by then. It costs nothing: when that rank exits, torchrun ends the silent ones."""

STORE_SECONDS = 1
"""Delay of the exit of rank 0 after a failure when it serves the rendezvous store: the others read its verdict."""


def is_main() -> bool:
    """Return whether this process is rank 0, by the variables of its launcher."""
    return _variable("RANK", "SLURM_PROCID") == "0"


def report(error: ApolloError | Stopped) -> bool:
    """Print an error that a user can fix, on the ranks that report it; return whether this rank does.

    Rank 0 reports, and one process of every other host, since its files may differ. A run that had to stop stops on all
    ranks alike: then only rank 0 reports. A file that cannot be written may concern any single rank.
    """
    of_all_ranks = isinstance(error, TrainingError | Preempted | Stopped)
    first_of_host = _variable("LOCAL_RANK", "SLURM_LOCALID") == "0"

    if is_main():
        who = ""
    elif isinstance(error, CheckpointError) or (first_of_host and not of_all_ranks):
        who = f"{_who()}: "
    else:
        return False

    print(f"apollo-sft: {who}{message_of(error)}", file=sys.stderr)
    return True


def report_unexpected(error: Exception) -> bool:
    """Print the traceback and, last, which rank failed and why; return whether this rank was the first to fail.

    A rank that only lost another one, or that failed after another one has reported, prints one line.
    """
    who = ""
    if _has_others():
        who = f"{_who()}: "

    text = str(error).strip()

    # torch raises a plain RuntimeError for both; only the text shows that another rank is the cause.
    if isinstance(error, RuntimeError):
        lost = [part for part in LOST_PEER if part in text]
        if lost:
            sys.stderr.write(f"apollo-sft: {who}lost another rank, which failed first ({lost[0]})\n")
            return False

        if TIMED_OUT in text:
            sys.stderr.write(
                f"apollo-sft: {who}a collective timed out (trainer.collective_timeout_seconds): not all ranks reached "
                "it; the warning above lists where each rank is\n"
            )
            return True

    is_first = _first_to_fail()
    cause = type(error).__name__
    if text:
        cause += f": {text}"

    trace = ""
    if is_first:
        trace = "".join(traceback.format_exception(error))

    # One write, so that the texts of several ranks do not mix.
    sys.stderr.write(redact(f"{trace}apollo-sft: {who}{cause}\n"))
    return is_first


def report_interrupt() -> bool:
    """Print on rank 0 that the user has interrupted the run. Return True: every rank counts it as reported."""
    if is_main():
        print("apollo-sft: interrupted", file=sys.stderr)
    return True


def leave(code: int, silent: bool) -> NoReturn:
    """End this process with an exit code. `silent`: another rank reports why.

    With several processes the interpreter is left at once: threads of the process group may abort its shutdown.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    if not _has_others():
        sys.exit(code)

    if silent:
        time.sleep(PATIENCE_SECONDS)
    elif code and is_main() and "TORCHELASTIC_RUN_ID" not in os.environ:
        time.sleep(STORE_SECONDS)

    os._exit(code)


def _first_to_fail() -> bool:
    # The module imports torch. Where it was not loaded yet, this rank has met no other one, so it is the first.
    rendezvous = sys.modules.get("apollo_sft.parallel.rendezvous")
    return rendezvous is None or bool(rendezvous.first_to_fail())


def _has_others() -> bool:
    return _variable("WORLD_SIZE", "SLURM_NTASKS", "1") != "1"


def _who() -> str:
    return f"rank {_variable('RANK', 'SLURM_PROCID')} on {socket.gethostname()}"


def _variable(name: str, in_slurm: str, otherwise: str = "0") -> str:
    """Return a variable as text: whether it is a number is checked later, where it can be refused."""
    return os.environ.get(name) or os.environ.get(in_slurm) or otherwise

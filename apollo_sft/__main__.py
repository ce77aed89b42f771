"""`python -m apollo_sft key=value …`, and what `torchrun -m apollo_sft` runs on every rank."""

from __future__ import annotations

import os
import socket
import sys
import time
import traceback

from apollo_sft.config.checks import check_paths
from apollo_sft.config.compose import YAML_PATH, Composed, compose, to_yaml
from apollo_sft.errors import ApolloError, CheckpointError, ConfigError, Preempted, Stopped, TrainingError
from apollo_sft.redact import redact
from apollo_sft.train.signals import StopFlag, end_with_parent

USAGE = """Train: python -m apollo_sft key=value …
       torchrun --standalone --nnodes=1 --nproc_per_node=N -m apollo_sft key=value …
       apollo-sft train [--nproc N] key=value …   starts one process per GPU by itself

  --help     this text
  --cfg job  print the resolved configuration and stop

Every key, its default and its meaning:
"""
INTERRUPTED = 130
LOST_PEER = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "failed to recv, got 0 bytes",
    "remote process exited",
    "communicator was aborted",
)
"""What gloo, NCCL and the rendezvous store say when another rank is gone."""
TIMED_OUT = "Timed out waiting"
"""What gloo says when not all ranks came to a collective within trainer.collective_timeout_seconds."""
PATIENCE_SECONDS = 3
"""How long a silent rank lives on after a failure: torchrun ends all ranks with the first that exits, and the rank that
speaks must have spoken by then. It costs nothing: when that rank exits, torchrun ends the silent ones."""

STORE_SECONDS = 1
"""How long rank 0 lives on after a failure when the rendezvous store is its own: the others read its verdict there."""


def main(arguments: list[str]) -> int:
    """Run one rank. Returns the exit code: 0 done, 1 failed, 2 refused, 75 stopped by a signal with the state saved.

    Raises: SystemExit with that code on a rank that leaves it to another one to say why.
    """
    if "--help" in arguments or "-h" in arguments:
        _say(USAGE + "\n" + YAML_PATH.read_text(encoding="utf-8"))
        return 0
    try:
        with StopFlag() as stop:
            composed = check(arguments)
            if composed is None:
                return 0
            from apollo_sft.train.run import train

            train(composed.config, composed.overridden, composed.notes, stop)
    except (ApolloError, Stopped) as error:
        if _report(error):
            return error.exit_code
        raise SystemExit(error.exit_code) from None
    except KeyboardInterrupt:
        if _is_main():
            print("apollo-sft: interrupted", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        if _report_unexpected(error):
            return 1
        raise SystemExit(1) from None
    return 0


def check(arguments: list[str]) -> Composed | None:
    """The composed config, refused before torch is imported if it cannot run; None when it was only to be printed.

    Raises: ConfigError.
    """
    if "--cfg" in arguments:
        at = arguments.index("--cfg")
        if arguments[at + 1 : at + 2] != ["job"]:
            raise ConfigError("--cfg prints the resolved configuration", expected="--cfg job")
        _say(to_yaml(compose([*arguments[:at], *arguments[at + 2 :]]).config).rstrip())
        return None
    composed = compose(arguments)
    check_paths(composed.config, set(composed.overridden))
    return composed


def _say(text: str) -> None:
    if not _is_main():
        return
    try:
        print(text, flush=True)
    except BrokenPipeError:  # `--help | head`: the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _report(error: ApolloError | Stopped) -> bool:
    """Whether this rank spoke: rank 0 does; so does one process of every other host, whose files may differ.

    A run that had to stop stops on all ranks alike. A file that cannot be written may be one rank's trouble.
    """
    of_all = isinstance(error, TrainingError | Preempted | Stopped)
    first_of_host = _variable("LOCAL_RANK", "SLURM_LOCALID") == "0" and not of_all
    if _is_main():
        print(f"apollo-sft: {error}", file=sys.stderr)
    elif first_of_host or isinstance(error, CheckpointError):
        print(f"apollo-sft: {_who()}: {error}", file=sys.stderr)
    else:
        return False
    return True


def _report_unexpected(error: Exception) -> bool:
    """The traceback and, last, who failed of what; in one write, so that ranks that speak at once do not mix.

    False, and one line, from a rank that only lost another one, or that failed after another one has said why.
    """
    who = f"{_who()}: " if _variable("WORLD_SIZE", "SLURM_NTASKS", "1") != "1" else ""
    text = str(error).strip()
    if isinstance(error, RuntimeError) and any(part in text for part in LOST_PEER):
        reason = next(part for part in LOST_PEER if part in text)
        sys.stderr.write(f"apollo-sft: {who}lost another rank, which failed first ({reason})\n")
        return False
    if isinstance(error, RuntimeError) and TIMED_OUT in text:
        missed = "for a rank that did not come; a warning above says where all stood"
        sys.stderr.write(f"apollo-sft: {who}waited trainer.collective_timeout_seconds {missed}\n")
        return True
    cause = f"{type(error).__name__}: {text}" if text else type(error).__name__
    launch = sys.modules.get("apollo_sft.parallel.launch")  # it brings torch, which may not have been needed yet
    is_first = launch is None or launch.first_to_fail()
    trace = "".join(traceback.format_exception(error)) if is_first else ""
    sys.stderr.write(redact(f"{trace}apollo-sft: {who}{cause}\n"))
    return is_first


def _who() -> str:
    return f"rank {_variable('RANK', 'SLURM_PROCID')} on {socket.gethostname()}"


def _is_main() -> bool:
    return _variable("RANK", "SLURM_PROCID") == "0"


def _variable(name: str, in_slurm: str, otherwise: str = "0") -> str:
    """As text: that it is a number is checked later, where it can be refused."""
    return os.environ.get(name) or os.environ.get(in_slurm) or otherwise


def run() -> None:
    """Never returns. With several processes the interpreter is left at once: threads of the process group may abort it
    while it shuts down."""
    silent = False
    if "TORCHELASTIC_RUN_ID" in os.environ:
        end_with_parent()
    try:
        code = main(sys.argv[1:])
    except SystemExit as silenced:
        code, silent = int(silenced.code or 0), True
    sys.stdout.flush()
    sys.stderr.flush()
    if _variable("WORLD_SIZE", "SLURM_NTASKS", "1") == "1":
        sys.exit(code)
    if silent:
        time.sleep(PATIENCE_SECONDS)
    elif code and _is_main() and "TORCHELASTIC_RUN_ID" not in os.environ:
        time.sleep(STORE_SECONDS)
    os._exit(code)


if __name__ == "__main__":
    run()

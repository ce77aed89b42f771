"""A signal as a request to stop: at once where nothing can be lost by it, else between two steps. No torch here."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from types import FrameType
from typing import Literal

from apollo_sft.errors import Preempted, Stopped
from apollo_sft.types import ignore

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
SAME_REQUEST_SECONDS = 2.0
"""A signal may come twice: from the scheduler, and from the launcher that passes it on."""
GRACE_SECONDS = 10.0
"""How long the main thread may take to stop at once. It receives no signal while it waits in a library."""
NOTHING_TO_SAVE = "no step was trained, so there was nothing to save"
"""What a user has when a signal ends a run before its first step."""

When = Literal["at once", "between steps", "stopping", "never"]


class StopFlag:
    """Catches `SIGNALS` while it is in use as a context manager.

    What a signal does depends on the stage of the run, which `at_once`, `between_steps` and `never` set:

    * `at_once` (the beginning): it raises `Stopped` in the main thread. If the main thread does not receive that, the
      process is ended after `GRACE_SECONDS`.
    * `between_steps`: it sets `name` only. A second signal, `SAME_REQUEST_SECONDS` after the first or later, ends the
      process with 128 + its number.
    * `never`: it does nothing.
    """

    name: str | None
    """The signal that came first, such as SIGTERM."""

    on_exit: Callable[[Literal["preempted", "failed"]], object]
    """Called before the process is ended from a thread, with the status that fits."""

    def __init__(self) -> None:
        self.name = None
        self.on_exit = ignore
        self._when: When = "at once"
        self._stage = "starting"
        self._kept = NOTHING_TO_SAVE
        self._ended = threading.Event()

    def __enter__(self) -> StopFlag:
        self._received, written = os.pipe()
        os.set_blocking(written, False)
        self._written = written
        self._previous_fd = signal.set_wakeup_fd(written, warn_on_full_buffer=False)
        self._previous = {number: signal.signal(number, self._catch) for number in SIGNALS}
        threading.Thread(target=self._watch, name="signals", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._previous_fd)
        self._ended.set()
        os.close(self._written)

    def at_once(self, stage: str, kept: str = NOTHING_TO_SAVE) -> None:
        """Stop at once from now on. `kept`: what the user has when a signal ends the run in this stage.

        Raises: Stopped if a signal came before.
        """
        self._stage = stage
        self._kept = kept
        self._when = "at once"
        if self.name is not None:
            self._stop()

    def between_steps(self, stage: str) -> None:
        """Set only `name` from now on."""
        self._stage = stage
        self._when = "between steps"

    def never(self) -> None:
        """Ignore signals from now on."""
        self._when = "never"

    def _catch(self, number: int, frame: FrameType | None) -> None:
        del frame
        self.name = self.name or signal.Signals(number).name
        if self._when == "at once":
            self._stop()

    def _stop(self) -> None:
        self._when = "stopping"
        raise Stopped(self._in_words())

    def _in_words(self) -> str:
        return f"stopped by {self.name} while {self._stage}: {self._kept}"

    def _watch(self) -> None:
        """Read signals from the pipe, until it is closed.

        In a thread of its own, which receives a signal at once whatever the main thread is waiting for.
        """
        first = None
        with os.fdopen(self._received, "rb", buffering=0) as received:
            for number in iter(partial(received.read, 1), b""):
                if number[0] in SIGNALS and self._when != "never":
                    first = first or time.monotonic()
                    self._end_if_due(number[0], time.monotonic() - first)

    def _end_if_due(self, number: int, seconds_since_first: float) -> None:
        if self._when == "between steps":
            if seconds_since_first > SAME_REQUEST_SECONDS:
                self.end_now("failed", 128 + number, f"ended at once by a second signal while {self._stage}")
        elif not self._ended.wait(GRACE_SECONDS):
            self.end_now("preempted", Preempted.exit_code, self._in_words())

    def end_now(self, status: Literal["preempted", "failed"], code: int, found: str) -> None:
        """End the process from any thread, whatever the main thread does. `found`: the message to the user."""
        who = ""
        if "RANK" in os.environ:
            who = f"rank {os.environ['RANK']} on {socket.gethostname()}: "
        try:
            sys.stderr.write(f"apollo-sft: {who}{found}\n")
            sys.stderr.flush()
            self.on_exit(status)
        finally:
            os._exit(code)  # sys.exit would end this thread only


def not_stopped() -> bool:
    """Return false: no signal came."""
    return False


def end_with_parent() -> None:
    """Ask the system to kill this process when the one that started it dies: no rank trains on without its launcher."""
    set_parent_death_signal = 1  # PR_SET_PDEATHSIG in linux/prctl.h
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)

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
from types import FrameType
from typing import Literal

from apollo_sft.errors import Preempted, Stopped
from apollo_sft.types import ignore

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
SAME_REQUEST_SECONDS = 2.0
"""A signal may come twice: from the scheduler, and from the launcher that passes it on."""
GRACE_SECONDS = 10.0
"""How long the main thread may take to stop at once. It hears nothing while it waits in a library."""
BEFORE_TRAINING = "before it took a step: nothing had to be saved"


class StopFlag:
    """Catches `SIGNALS` while it is in use as a context manager; `name` is the one that came first, or None.

    `at_once` (the beginning) raises `Stopped` in the main thread, and ends the process after `GRACE_SECONDS` if that
    is not heard. `between_steps` sets the flag only; there a second signal, `SAME_REQUEST_SECONDS` after the first or
    later, ends the process with 128 + its number. After `never` no signal does anything.
    `last_words` is called before such an end, in a thread, with the status that fits.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        self.last_words: Callable[[Literal["preempted", "failed"]], object] = ignore
        self._when: Literal["at once", "between steps", "stopping", "never"] = "at once"
        self._where = BEFORE_TRAINING
        self._ended = threading.Event()

    def __enter__(self) -> StopFlag:
        self._heard, written = os.pipe()
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

    def between_steps(self) -> None:
        self._when = "between steps"

    def at_once(self, where: str) -> None:
        """`where`: in words, what goes on from here on and what is safe. Raises: Stopped if a signal came before."""
        self._where = where
        self._when = "at once"
        if self.name is not None:
            self._stop()

    def never(self) -> None:
        self._when = "never"

    def _catch(self, number: int, frame: FrameType | None) -> None:
        del frame
        self.name = self.name or signal.Signals(number).name
        if self._when == "at once":
            self._stop()

    def _stop(self) -> None:
        self._when = "stopping"
        raise Stopped(f"stopped by {self.name} {self._where}")

    def _watch(self) -> None:
        """In a thread of its own, which hears a signal at once whatever the main thread is waiting for."""
        first = None
        with os.fdopen(self._heard, "rb", buffering=0) as heard:
            while number := heard.read(1):
                if number[0] in SIGNALS and self._when != "never":
                    first = first or time.monotonic()
                    self._end_if_due(number[0], time.monotonic() - first)

    def _end_if_due(self, number: int, seconds_since_first: float) -> None:
        if self._when == "between steps":
            if seconds_since_first > SAME_REQUEST_SECONDS:
                self.end_now("failed", 128 + number, "ended at once by a second signal")
        elif not self._ended.wait(GRACE_SECONDS):
            self.end_now("preempted", Preempted.exit_code, f"stopped by {self.name} {self._where}")

    def end_now(self, status: Literal["preempted", "failed"], code: int, found: str) -> None:
        """End the process from any thread, whatever the main thread does. `found` is what the user is told."""
        who = f"rank {os.environ['RANK']} on {socket.gethostname()}: " if "RANK" in os.environ else ""
        try:
            sys.stderr.write(f"apollo-sft: {who}{found}\n")
            sys.stderr.flush()
            self.last_words(status)
        finally:
            os._exit(code)


def end_with_parent() -> None:
    """Ask the system to kill this process when the one that started it dies: no rank trains on without its launcher."""
    set_parent_death_signal = 1  # PR_SET_PDEATHSIG in linux/prctl.h
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)

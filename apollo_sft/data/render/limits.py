"""Bound the time and the memory of templates, which are foreign code.

Three limits, each for what the one before cannot stop: a repeated alarm ends a rendering that runs too long, a
limit of address space makes an allocation fail, and a limit of CPU time ends the process when a loop in C runs so long
that Python handles no signal.
"""

from __future__ import annotations

import faulthandler
import math
import os
import resource
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TypeVar

Argument = TypeVar("Argument")
Result = TypeVar("Result")

MAX_SECONDS = 5
"""CPU time of one rendering, and of compiling the template; an honest one takes microseconds."""

TICK_SECONDS = 1
"""CPU time between two alarms. A call is noticed at the first one and ended at a later one."""

MAX_MEMORY_BYTES = 2 << 30
"""Address space that the renderings of one call of `Limits.bounded` may add to the process."""

KILL_SECONDS = 20
"""CPU time after which the system ends the process: a loop in C that handles no signal cannot be left otherwise. The
last output of the process is then a traceback of the template."""

STDERR = 2


class TimeUpError(BaseException):
    """A rendering took too long. Not an Exception, because what a template calls may swallow those."""


class Limits:
    """The limits on one template."""

    def __init__(self) -> None:
        self._events = 0
        """Starts and ends of calls, counted together: odd while a call runs."""

    def call(self, work: Callable[[Argument], Result], argument: Argument) -> Result:
        """Return what `work` returns. Raises: TimeUpError inside of `bounded`, and whatever `work` raises."""
        self._events += 1
        try:
            return work(argument)
        finally:
            self._events += 1

    @contextmanager
    def bounded(self) -> Iterator[None]:
        """Limit memory while the context is open, and the time of each call in it. Main thread only.

        Source: setrlimit(2), setitimer(2). The clock counts CPU time, so that a busy machine fails no honest template.
        """
        memory = resource.getrlimit(resource.RLIMIT_AS)
        cpu = resource.getrlimit(resource.RLIMIT_CPU)
        handler = signal.signal(signal.SIGPROF, self._alarm(cpu))
        faulthandler.register(signal.SIGXCPU, file=STDERR, all_threads=False, chain=True)
        try:
            resource.setrlimit(resource.RLIMIT_AS, _at_most(_address_space_bytes() + MAX_MEMORY_BYTES, memory))
            _postpone_kill(cpu)
            signal.setitimer(signal.ITIMER_PROF, TICK_SECONDS, TICK_SECONDS)
            yield
        finally:
            # The timer first: an alarm without its handler would end the process.
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.signal(signal.SIGPROF, handler)
            resource.setrlimit(resource.RLIMIT_AS, memory)
            resource.setrlimit(resource.RLIMIT_CPU, cpu)
            faulthandler.unregister(signal.SIGXCPU)

    def _alarm(self, cpu: tuple[int, int]) -> Callable[[int, FrameType | None], None]:
        """Return the handler of the repeated signal: it ends a call that it finds too often."""
        seen = 0
        count = 0

        def tick(number: int, frame: FrameType | None) -> None:
            del number, frame
            nonlocal seen, count
            _postpone_kill(cpu)

            # The same number of events as at the last tick: the same call still runs, or none does.
            count = count + 1 if seen == self._events else 1
            seen = self._events
            is_running = seen % 2 == 1
            if count * TICK_SECONDS > MAX_SECONDS and is_running:
                raise TimeUpError

        return tick


def _postpone_kill(limits: tuple[int, int]) -> None:
    end = math.ceil(time.process_time()) + KILL_SECONDS
    resource.setrlimit(resource.RLIMIT_CPU, _at_most(end, limits))


def _at_most(soft: int, limits: tuple[int, int]) -> tuple[int, int]:
    """Return `soft` as (soft, hard), without raising any limit that the process has already."""
    present = [limit for limit in limits if limit != resource.RLIM_INFINITY]
    return min([soft, *present]), limits[1]


def _address_space_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    return pages * os.sysconf("SC_PAGE_SIZE")

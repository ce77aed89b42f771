"""Heartbeats: a rank that was killed, is stopped, or never comes to a collective of the others is reported by name.

Four ranks, for example. Each writes a heartbeat into the rendezvous store every few seconds and watches the one of its
successor: 0 watches 1, 1 watches 2, 2 watches 3, 3 watches 0. Rank 2 is stopped: its heartbeat does not change any
more, and rank 1 reports it after the limit. Rank 2 instead hangs in a loop of its own: its heartbeats continue, the
others wait for it in a collective, no step ends, and rank 0 reports the line of code in which each rank is.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch.distributed as dist

from apollo_sft.parallel.launch import World
from apollo_sft.parallel.rendezvous import READY, rendezvous_store

SILENCE_SECONDS = 300.0
"""The longest time without a heartbeat. A rank writes them while it waits and computes, so one without is stopped."""
LAST_WORD_SECONDS = 1.0
"""How long the end of a run waits for the last heartbeat to be written."""
MOST_PLACES = 4
FAILED_HERE = "failed"
"""In the place of the number in the last heartbeat of a rank that failed."""


class Pulse:
    """Write the heartbeat of this rank, and watch the next rank and the store, in threads.

    `lost` is called with a sentence when the next rank or the store was silent for `limit_seconds`. On rank 0 `stuck`
    is called with the place of every rank when no step has ended, and the main thread has not moved, for as long; once
    for each step, and not before the first `step_ended`.
    """

    def __init__(
        self, world: World, limit_seconds: float, lost: Callable[[str], object], stuck: Callable[[str], object]
    ) -> None:
        self._rank = world.rank
        self._size = world.size
        self._next = (world.rank + 1) % world.size
        self._limit = min(limit_seconds, SILENCE_SECONDS)
        self._every = min(self._limit / 5, 10.0)
        self._lost = lost
        self._stuck = stuck
        self._over = threading.Event()
        self._last_word = READY

        self._beat_of_next = ""
        self._place = ""
        # When the next rank's heartbeat changed, when the store answered, and when this rank's main thread moved.
        self._changed_at = time.monotonic()
        self._answered_at = self._changed_at
        self._moved_at = float("inf")

        self._threads: list[threading.Thread] = []
        if world.size > 1:
            # A connection of its own: the main thread may block the other one while it waits.
            self._store = rendezvous_store().clone()
            self._threads = [threading.Thread(target=work, daemon=True) for work in (self._beat, self._watch)]
            for thread in self._threads:
                thread.start()

    def __enter__(self) -> Pulse:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.end(failed=kind is not None)

    def step_ended(self) -> None:
        """Note that the main thread moves: it is not stuck, even if it is at the same line of code again."""
        self._moved_at = time.monotonic()

    def end(self, failed: bool = False) -> None:
        """End the heartbeats, so that no other rank reports this one as lost; unless it has failed.

        The others may not notice a failure by themselves, for example when they are in a loop without a collective.
        """
        if failed:
            self._last_word = f"{FAILED_HERE} {socket.gethostname()}"
        self._over.set()
        for thread in self._threads:
            thread.join(LAST_WORD_SECONDS)

    def _beat(self) -> None:
        """Write heartbeats, and read those of the next rank, until the end."""
        mine = f"alive/{self._rank}"
        number = 0

        # When the store has ended, so will the job: there is nothing to report.
        with suppress(dist.DistNetworkError):
            while not self._over.wait(self._every):
                number += 1
                place = _place_of_main_thread()
                self._store.set(mine, f"{number} {socket.gethostname()} {place}")
                beat = self._last_beat(self._next)
                self._answered_at = time.monotonic()

                if beat != self._beat_of_next:
                    self._beat_of_next = beat
                    self._changed_at = self._answered_at

                if place != self._place:
                    self._place = place
                    self._moved_at = max(self._moved_at, self._answered_at)

                # Infinity until the next step has ended: one report for each step.
                if self._rank == 0 and self._answered_at - self._moved_at > self._limit:
                    self._stuck(self._places_of_all())
                    self._moved_at = float("inf")

            self._store.set(mine, self._last_word)

        self._over.set()

    def _last_beat(self, rank: int) -> str:
        """Return `number host place`, READY of a rank that has ended well; empty before the first heartbeat."""
        key = f"alive/{rank}"
        if not self._store.check([key]):
            return ""
        return str(self._store.get(key).decode())

    def _places_of_all(self) -> str:
        ranks: dict[str, list[str]] = defaultdict(list)
        for rank in range(self._size):
            number, _, rest = self._last_beat(rank).partition(" ")
            host, _, place = rest.partition(" ")
            if number != READY:
                ranks[place or "not known"].append(_name(rank, host))

        # Most ranks wait in a collective of torch. Those that are elsewhere, and then the fewest, are the cause.
        fewest = sorted(ranks, key=lambda place: ("distributed/" in place, len(ranks[place])))
        seen = [f"{_shortly(ranks[place])}: in {place}" for place in fewest[:MOST_PLACES]]
        return f"no step has ended for {self._limit:.0f} s; " + "; ".join(seen)

    def _watch(self) -> None:
        """Report the next rank, or the store, when it was silent for too long."""
        before = time.monotonic()

        while not self._over.wait(self._every):
            now = time.monotonic()
            # This thread itself was late: this rank, or the whole machine, was stopped for a while, not the others.
            if now - before > 3 * self._every:
                self._changed_at = now
                self._answered_at = now

            before = now

            if now - self._answered_at > self._limit:
                silence = f"the rendezvous store did not answer for {self._limit:.0f} s"
                self._lost(f"{silence}: {_name_of_server()} does not respond")
            elif now - self._changed_at > self._limit and self._beat_of_next != READY:
                word, host = (self._beat_of_next or " ").split(" ")[:2]
                who = _name(self._next, host)
                if word == FAILED_HERE:
                    self._lost(f"{who} has failed; this rank did not notice")
                else:
                    self._lost(f"{who} does not respond: it sent no heartbeat for {self._limit:.0f} s")


def _name(rank: int, host: str) -> str:
    """Return the name of a rank; `host` is empty before its first heartbeat."""
    if not host:
        return f"rank {rank}"
    return f"rank {rank} on {host}"


def _place_of_main_thread() -> str:
    """Return `function (folder/file.py:line)` of the innermost Python frame of the main thread."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    if frame is None:
        return "its end"
    file = Path(frame.f_code.co_filename)
    return f"{frame.f_code.co_name} ({'/'.join(file.parts[-3:])}:{frame.f_lineno})"


def _shortly(ranks: list[str]) -> str:
    if len(ranks) == 1:
        return ranks[0]
    return f"{len(ranks)} ranks, the first {ranks[0]}"


def _name_of_server() -> str:
    """Return the name of the process that serves the rendezvous store."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return f"torchrun on {os.environ.get('MASTER_ADDR')}"
    return f"rank 0 on {os.environ.get('MASTER_ADDR')}"

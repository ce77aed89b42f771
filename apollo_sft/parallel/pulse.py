"""Signs of life: a rank that is gone, stands still, or never comes to where the others wait for it is named."""

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
"""The longest that a rank may give no sign of life. It gives one while it waits and computes: it must be stopped."""
LAST_WORD_SECONDS = 1.0
MOST_PLACES = 4
FAILED_HERE = "failed"


class Pulse:
    """A sign of life of each rank at the rendezvous store, with the place where its main thread stands.

    Each rank looks after the next one. `lost` is called in a thread, with a sentence, when that one or the store was
    silent for `limit_seconds`. On rank 0 `stuck` is called, once for each step after the first `step_ended`, with where
    every rank stands, when no step has ended and the main thread has not moved for so long.
    """

    def __init__(
        self, world: World, limit_seconds: float, lost: Callable[[str], object], stuck: Callable[[str], object]
    ) -> None:
        self._rank, self._size = world.rank, world.size
        self._next = (world.rank + 1) % world.size
        self._limit = min(limit_seconds, SILENCE_SECONDS)
        self._every = min(self._limit / 5, 10.0)
        self._lost, self._stuck = lost, stuck
        self._over = threading.Event()
        self._said = self._place = ""
        self._threads: list[threading.Thread] = []
        self._last_word = READY
        self._heard_at = self._answered_at = time.monotonic()
        self._moved_at = float("inf")
        if world.size > 1:
            self._store = rendezvous_store().clone()  # the main thread may hold the other connection while it waits
            self._threads = [threading.Thread(target=work, daemon=True) for work in (self._beat, self._judge)]
            for thread in self._threads:
                thread.start()

    def __enter__(self) -> Pulse:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.end(failed=kind is not None)

    def step_ended(self) -> None:
        """The main thread has come on: it is not stuck even if it stands in the same place again."""
        self._moved_at = time.monotonic()

    def end(self, failed: bool = False) -> None:
        """This rank is done; nobody is to miss it. One that failed tells those that do not notice."""
        if failed:
            self._last_word = f"{FAILED_HERE} {socket.gethostname()}"
        self._over.set()
        for thread in self._threads:
            thread.join(LAST_WORD_SECONDS)

    def _beat(self) -> None:
        mine, number = f"alive/{self._rank}", 0
        with suppress(dist.DistNetworkError):  # the store has ended, and so will the job
            while not self._over.wait(self._every):
                number += 1
                place = _main_thread_stands_in()
                self._store.set(mine, f"{number} {socket.gethostname()} {place}")
                said = self._said_by(self._next)
                self._answered_at = time.monotonic()
                if said != self._said:
                    self._said, self._heard_at = said, self._answered_at
                if place != self._place:
                    self._place, self._moved_at = place, max(self._moved_at, self._answered_at)
                if self._rank == 0 and self._answered_at - self._moved_at > self._limit:
                    self._stuck(self._where_all_stand())
                    self._moved_at = float("inf")
            self._store.set(mine, self._last_word)
        self._over.set()

    def _said_by(self, rank: int) -> str:
        """`number host place`, or READY of a rank that is done; empty when it has said nothing yet."""
        key = f"alive/{rank}"
        return str(self._store.get(key).decode()) if self._store.check([key]) else ""

    def _where_all_stand(self) -> str:
        """The places with the fewest ranks first: the others wait for those."""
        ranks: dict[str, list[str]] = defaultdict(list)
        for rank in range(self._size):
            number, _, rest = self._said_by(rank).partition(" ")
            host, _, place = rest.partition(" ")
            if number != READY:
                ranks[place or "not known"].append(f"rank {rank} on {host}" if host else f"rank {rank}")
        fewest = sorted(ranks, key=lambda place: ("distributed/" in place, len(ranks[place])))
        seen = [f"{_shortly(ranks[place])}: in {place}" for place in fewest[:MOST_PLACES]]
        return f"no step has ended for {self._limit:.0f} s; " + "; ".join(seen)

    def _judge(self) -> None:
        before = time.monotonic()
        while not self._over.wait(self._every):
            now = time.monotonic()
            if now - before > 3 * self._every:  # it was this rank, or the whole machine, that stood still
                self._heard_at = self._answered_at = now
            before = now
            if now - self._answered_at > self._limit:
                self._lost(f"the rendezvous store did not answer for {self._limit:.0f} s: {_who_serves()} stands still")
            elif now - self._heard_at > self._limit and self._said != READY:
                word, host = (self._said or " ").split(" ")[:2]
                who = f"rank {self._next} on {host}" if host else f"rank {self._next}"
                silent = f"{who} stands still: it gave no sign of life for {self._limit:.0f} s"
                self._lost(f"{who} has failed; this rank did not notice" if word == FAILED_HERE else silent)


def _main_thread_stands_in() -> str:
    """`function (folder/file.py:line)` of its innermost Python frame."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    if frame is None:
        return "its end"
    file = Path(frame.f_code.co_filename)
    return f"{frame.f_code.co_name} ({'/'.join(file.parts[-3:])}:{frame.f_lineno})"


def _shortly(ranks: list[str]) -> str:
    return ranks[0] if len(ranks) == 1 else f"{len(ranks)} ranks, the first {ranks[0]}"


def _who_serves() -> str:
    return "torchrun there" if "TORCHELASTIC_RUN_ID" in os.environ else f"rank 0 on {os.environ.get('MASTER_ADDR')}"

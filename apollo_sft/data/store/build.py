"""Build one store: read all rows once, in one process or several, and refuse what only all of them show."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from apollo_sft.data.read.files import shown
from apollo_sft.data.read.rows import num_rows
from apollo_sft.data.store.fingerprint import tokenizer_hash
from apollo_sft.data.store.store_files import StoreWriter
from apollo_sft.data.store.summary import StoreSummary
from apollo_sft.data.store.tokenise import CHUNK_ROWS, Shard, StoreRequest, Stretch, Tokeniser, shard_rows
from apollo_sft.errors import DataError

if TYPE_CHECKING:
    from apollo_sft.data.store.workers import Done

FIRST_LOG_SECONDS = 5.0
LAST_LOG_SECONDS = 60.0
"""Seconds between two lines of progress, at first and at most."""

SHARDS_OF_A_PROCESS = 4

ROWS_OF_A_PROCESS = 20_000
"""A process needs about as much CPU time to start as to tokenise so many short rows."""

FEWEST_ROWS = 4096
MOST_ROWS = 65_536
"""Rows of a shard. A file may have to be read up to the first row of a shard, so shards are large."""

Say = Callable[[str], None]


class Builder:
    """Writes the store of `request` into `folder`."""

    def __init__(self, request: StoreRequest, files: list[str], folder: Path, say: Say) -> None:
        self.request = request
        self.data = request.data
        self.files = files
        self.folder = folder
        self.say = say
        named = [shown(file) for file in files]
        self.summary = StoreSummary(files=named)
        self.progress = ProgressLog(say, request.split)
        self.writer = StoreWriter(folder, named)

    def run(self, key: str) -> None:
        """Write the store with this key. Raises: as `prepare_store`."""
        try:
            self._tokenise()
            self.progress.end()
            self._refuse()
            self.writer.finish(key, self.summary)
        finally:
            self.writer.abandon()

    def _tokenise(self) -> None:
        request = self.request
        limit = request.max_rows
        if self.data.custom_cls.path is not None:
            from apollo_sft.data.read.custom import custom_rows

            # It is one iterator of the user's, which no second process can share.
            rows = custom_rows(self.files, request.tokenizer, self.data, limit)
            self._count(Tokeniser(request).run(rows, self.writer))
            return

        counts = [(file, num_rows([file])) for file in self.files]
        total = sum(count for _, count in counts)
        if limit >= 0:
            total = min(total, limit)
        self.progress.total = total

        processes = request.processes or num_processes(total)
        if processes == 1:
            [shard] = shards(counts, total, total) or [Shard(0, ())]
            self._count(Tokeniser(request).run(shard_rows(shard, self.data), self.writer))
            return

        # Several shards for each process: the last ones are done at about the same time.
        size = min(max(total // (SHARDS_OF_A_PROCESS * processes), FEWEST_ROWS), MOST_ROWS)
        self._share(shards(counts, total, size), processes)

    def _count(self, chunks: Iterator[StoreSummary]) -> None:
        for chunk in chunks:
            self._add(chunk)
            self.progress.add(chunk.num_rows, chunk.first_bad_text)

    def _share(self, parts: Sequence[Shard], processes: int) -> None:
        from apollo_sft.data.store.workers import Job, Progress, Workers

        job = Job(self.request, self.files, self.folder, tokenizer_hash(self.request.tokenizer))
        with Workers(min(processes, len(parts)), job) as workers:
            for message in workers.results(parts):
                if isinstance(message, Progress):
                    self.progress.add(message.num_rows, message.bad)
                else:
                    self._take(message)

    def _take(self, done: Done) -> None:
        from apollo_sft.data.store.workers import take

        take(done, self.writer)
        for chunk in done.chunks:
            self._add(chunk)

    def _add(self, chunk: StoreSummary) -> None:
        self.summary.add(chunk)
        # The module is loaded only where a row is bad.
        if self.summary.bad:
            from apollo_sft.data.store.bad_rows import without_rare

            without_rare(self.summary)

    def _refuse(self) -> None:
        summary = self.summary
        total = self.progress.total
        if total is not None and summary.num_rows != total:
            raise DataError(
                f"{self.request.files_key}: the files changed while they were read",
                found=f"{summary.num_rows:,} rows, where {total:,} had been counted",
                fix="run the same command again when no other program writes them",
            )

        summary.stop_tokens = dict(sorted(summary.stop_tokens.items(), key=lambda item: -item[1]))
        if summary.rows_bad:
            self._refuse_bad()
        self._refuse_over_length()
        self._refuse_no_target()

    def _refuse_bad(self) -> None:
        from apollo_sft.data.store.bad_rows import refuse_bad, refuse_too_many_bad

        if self.data.bad_rows == "error":
            refuse_bad(self.summary, self.request.files_key)
        elif not self.summary.num_targets:
            refuse_too_many_bad(self.summary, self.request.files_key, self.data.max_bad_ratio)

    def _refuse_over_length(self) -> None:
        summary = self.summary
        data = self.data
        if data.truncation != "error" or not summary.over_max_length.count:
            return
        raise DataError(
            f"{summary.over_max_length.count:,} of {summary.num_rows:,} rows are longer than data.max_length",
            found=f"first: {summary.over_max_length.examples[0]}; longest: {summary.longest_row} "
            f"({summary.longest_tokens:,} tokens)",
            expected=f"at most {data.max_length:,} tokens",
            fix=f"data.max_length={summary.longest_tokens}, or data.truncation=right or left (the side that is cut)",
        )

    def _refuse_no_target(self) -> None:
        summary = self.summary
        if summary.num_targets:
            return
        if not summary.num_rows:
            raise DataError(f"{self.request.files_key}: there is no row", found=", ".join(self.files))

        fix = None
        if summary.targets_lost:
            fix = f"data.max_length={summary.longest_tokens}"
        raise DataError(
            f"{self.request.files_key}: no row has a token to train on",
            found=f"{summary.num_rows:,} rows, {summary.targets_lost:,} targets cut or dropped",
            expected="at least one target",
            fix=fix,
        )


class ProgressLog:
    """Logs the progress of tokenising: seldom, and the first row that cannot be used."""

    def __init__(self, say: Say, split: str) -> None:
        self.say = say
        self.split = split
        self.total: int | None = None
        self.done = 0
        self.has_bad = False
        self.start = time.monotonic()
        self.last_log = self.start
        self.first: tuple[float, int] | None = None
        """(time, rows) of the first report. Rates count from it, because processes may take a while to start."""

    def add(self, rows: int, bad: str | None) -> None:
        """Count rows, and log the progress if it is time to. `bad`: the message about one that cannot be used."""
        self.done += rows
        now = time.monotonic()
        if self.first is None:
            self.last_log = now
            self.first = (now, self.done)

        if bad is not None and not self.has_bad:
            self.has_bad = True
            self.say(f"a row cannot be used; all other rows are checked before the end. The row is:\n{bad}")

        began, before = self.first
        # The longer it takes, the less often.
        pause = min(max(FIRST_LOG_SECONDS, (now - began) / 20), LAST_LOG_SECONDS)
        if now - self.last_log > pause:
            self.last_log = now
            self.say(progress(self.done, self.total, (self.done - before) / (now - began)))

    def end(self) -> None:
        """Log the number of rows and the time of all of them."""
        seconds = max(time.monotonic() - self.start, 1e-9)
        rate = f"{self.done / seconds:,.0f} rows/s"
        self.say(f"tokenised {self.done:,} {self.split} rows in {seconds:.1f} s, {rate}")


def num_processes(num_rows: int) -> int:
    """Return one process for each core that this one may use, if there are rows for so many."""
    return max(1, min(num_cores(), num_rows // ROWS_OF_A_PROCESS))


def num_cores(quota: Path = Path("/sys/fs/cgroup/cpu.max")) -> int:
    """Return the number of cores that this process may run on, at most as many as its container gives it time for.

    Source: cpu.max in docs.kernel.org/admin-guide/cgroup-v2.html.
    """
    cores = len(os.sched_getaffinity(0))
    with suppress(OSError, ValueError):
        most, period = quota.read_text(encoding="ascii").split()
        cores = min(cores, max(1, int(most) // int(period)))
    return cores


def progress(done: int, total: int | None, rate: float) -> str:
    """Return `tokenised 12,000 of 1,000,000 rows, 5,100 rows/s, 3 min left`.

    `rate`: rows/s. `total`: None where it is not known, as for the user's own class.
    """
    if total is None:
        return f"tokenised {done:,} rows, {rate:,.0f} rows/s"
    text = f"tokenised {done:,} of {total:,} rows, {rate:,.0f} rows/s"
    if not rate:
        return text
    return f"{text}, {duration((total - done) / rate)} left"


def duration(seconds: float) -> str:
    """Return a duration in words: `45 s`, `3 min`, `2 h 5 min`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60} min"


def shards(counts: Sequence[tuple[str, int]], total: int, size: int) -> list[Shard]:
    """Return the first `total` rows of these files, in shards of `size` rows, rounded up to whole chunks."""
    size = -(-max(size, 1) // CHUNK_ROWS) * CHUNK_ROWS
    stretches: list[list[Stretch]] = []
    room = 0  # rows that still fit into the last shard
    left = total
    for file, count in counts:
        first = 0
        count = min(count, left)
        left -= count
        # A file may fill several shards, and a shard may hold several files.
        while first < count:
            if not room:
                stretches.append([])
                room = size
            number = min(count - first, room)
            stretches[-1].append(Stretch(file, first, number))
            first += number
            room -= number
    return [Shard(index, tuple(some)) for index, some in enumerate(stretches)]

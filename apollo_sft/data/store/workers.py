"""Tokenise shards of a dataset in several processes, each into a folder of its own. They end with their parent.

Started as new interpreters: threads of torch and of tokenizers do not survive a fork.
"""

from __future__ import annotations

import os
import queue
import shutil
import signal
import socket
import subprocess
import sys
import threading
import traceback
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from apollo_sft.data.read.files import shown
from apollo_sft.data.store.fingerprint import tokenizer_hash
from apollo_sft.data.store.store_files import StoreWriter
from apollo_sft.data.store.summary import StoreSummary
from apollo_sft.data.store.tokenise import Shard, StoreRequest, Tokeniser, shard_rows
from apollo_sft.errors import ApolloError

AHEAD = 4
"""Shards for each process that may be started before an earlier one is done: they wait on the disk."""

IMPORT_SERVE = "from apollo_sft.data.store.workers import serve"

BLOCKED_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
"""Signals that go to all processes of a terminal or a job. Workers ignore them: their parent ends them itself."""


@dataclass(frozen=True, slots=True)
class Job:
    """The first message to every worker."""

    request: StoreRequest
    files: list[str]

    folder: Path
    """Parts of the store are written here."""

    tokenizer_hash: str
    """The worker checks that its tokenizer arrived unchanged."""


@dataclass(frozen=True, slots=True)
class Progress:
    """Rows that a worker has tokenised since its last message."""

    num_rows: int

    bad: str | None
    """The message about the first of them that cannot be used."""


@dataclass(frozen=True, slots=True)
class Done:
    """A shard is tokenised."""

    index: int

    part: Path
    """The folder with its samples."""

    chunks: list[StoreSummary]
    """The summaries of its chunks, in order."""


class Workers:
    """Runs `number` processes while the context is open. None of them outlives it."""

    def __init__(self, number: int, job: Job) -> None:
        self._number = number
        self._job = job
        self._processes: dict[Connection, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Workers:
        try:
            for _ in range(self._number):
                connection, process = _start()
                self._processes[connection] = process
            for connection in self._processes:
                self._send(connection, self._job)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes.values():
            process.kill()
        for connection, process in self._processes.items():
            process.wait()
            connection.close()

    def results(self, shards: Sequence[Shard]) -> Iterator[Progress | Done]:
        """Yield every shard, in order, and the progress in between.

        Raises: DataError as `Tokeniser.run`; ApolloError when a process was ended.
        """
        waiting = deque(shards)
        idle = list(self._processes)
        early: dict[int, Done] = {}
        following = 0
        while following < len(shards):
            # Not too far ahead of a slow shard: all that is done before it waits on the disk.
            while idle and waiting and waiting[0].index < following + AHEAD * self._number:
                self._send(idle.pop(), waiting.popleft())
            for connection in wait(list(self._processes)):
                message = self._receive(connection)  # type: ignore[arg-type]
                if isinstance(message, Done):
                    early[message.index] = message
                    idle.append(connection)  # type: ignore[arg-type]
                else:
                    yield message

            while following in early:
                yield early.pop(following)
                following += 1

    def _send(self, connection: Connection, message: Job | Shard) -> None:
        try:
            connection.send(message)
        except OSError:
            raise self._lost(connection) from None

    def _receive(self, connection: Connection) -> Progress | Done:
        try:
            message = connection.recv()
        except (EOFError, OSError):
            raise self._lost(connection) from None
        if isinstance(message, Exception):
            raise message
        assert isinstance(message, Progress | Done)
        return message

    def _lost(self, connection: Connection) -> ApolloError:
        code = self._processes[connection].wait()
        found = f"exit code {code}"
        if code < 0:
            found = f"signal {signal.Signals(-code).name}"
        if code == -signal.SIGKILL:
            found += ", as the system sends it when memory runs out"
        return ApolloError(
            "a process that tokenised rows was ended from outside",
            found=found,
            expected=f"{self._number} processes until all rows are done; no part of their work is used",
            fix="run the same command again, on fewer cores (taskset) if memory ran out",
        )


def _start() -> tuple[Connection, subprocess.Popen[bytes]]:
    """Start a process that receives what is sent over the connection."""
    mine, theirs = socket.socketpair()
    listen = f"import sys; sys.path[:] = {sys.path!r}; {IMPORT_SERVE}; serve({theirs.fileno()})"
    # The new process inherits the mask, and keeps it.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, BLOCKED_SIGNALS)
    try:
        with theirs:
            process = subprocess.Popen(
                [sys.executable, "-c", listen],
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                env=os.environ | {"TOKENIZERS_PARALLELISM": "false"},
            )
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return Connection(mine.detach()), process


def serve(handle: int) -> None:
    """Run a worker: receive a job, then shards, until the other end is closed."""
    connection = Connection(handle)
    messages: queue.SimpleQueue[Any] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(connection, messages), daemon=True).start()
    try:
        job: Job = messages.get()
        assert tokenizer_hash(job.request.tokenizer) == job.tokenizer_hash, (
            "the tokenizer changed on its way to this process"
        )
        tokeniser = Tokeniser(job.request)

        while True:
            connection.send(_tokenise(tokeniser, job, messages.get(), connection))
    except ApolloError as error:
        connection.send(error)
    except Exception:
        connection.send(RuntimeError(f"in a process that tokenises rows:\n{traceback.format_exc()}"))


def _listen(connection: Connection, messages: queue.SimpleQueue[Any]) -> None:
    """Receive messages in a thread of its own: the process ends with its parent, whatever the main thread does."""
    try:
        while True:
            messages.put(connection.recv())
    except (EOFError, OSError):
        os._exit(1)


def _tokenise(tokeniser: Tokeniser, job: Job, shard: Shard, connection: Connection) -> Done:
    part = job.folder / f"part-{shard.index:06d}"
    part.mkdir()
    writer = StoreWriter(part, [shown(file) for file in job.files])
    chunks = []
    for summary in tokeniser.run(shard_rows(shard, job.request.data), writer):
        chunks.append(summary)
        connection.send(Progress(summary.num_rows, summary.first_bad_text))
    writer.close(synced=False)
    return Done(shard.index, part, chunks)


def take(done: Done, writer: StoreWriter) -> None:
    """Append a part to the store, and remove it."""
    writer.take(done.part)
    shutil.rmtree(done.part)

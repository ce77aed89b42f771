"""A recorder of file operations that can stop the world at the n-th one, as a kill or a power loss would."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest


class Crash(BaseException):
    """Not an Exception: no handler in the code under test may catch it."""


@dataclass(frozen=True)
class Pending:
    """A rename or a removal that is durable only when `folder` has been synced."""

    folder: Path
    undo: Callable[[], None]


class FileOperations:
    """Counts opens for writing, syncs, renames, removals and new folders; raises `Crash` before number `crash_at`.

    `lose("all")` then takes away what a power loss may take: the content of files, and the renames and removals in
    folders, that were not synced since. `lose("oldest")` takes only the oldest such rename or removal: the disk need
    not keep the order.
    """

    def __init__(self, crash_at: int | None) -> None:
        self.crash_at = crash_at
        self.count = 0
        self._unsynced_files: set[Path] = set()
        self._pending: list[Pending] = []
        self._move = os.replace

    def _tick(self) -> None:
        if self.count == self.crash_at:
            raise Crash
        self.count += 1

    @contextmanager
    def active(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[FileOperations]:
        with monkeypatch.context() as patch:
            patch.setattr(os, "unlink", self._removing(os.unlink))
            patch.setattr(os, "fsync", self._syncing(os.fsync))
            patch.setattr(io, "open", self._opening(io.open))
            for name in ("replace", "rename"):
                patch.setattr(os, name, self._moving)
            for name in ("rmdir", "mkdir"):
                patch.setattr(os, name, self._counted(getattr(os, name)))
            yield self

    def lose(self, what: str) -> None:
        lost = self._pending[:1] if what == "oldest" else self._pending[::-1]
        for pending in lost:
            pending.undo()
        for path in self._unsynced_files if what == "all" else ():
            if path.is_file():
                path.write_bytes(b"")

    def _moving(self, source: Any, target: Any) -> None:
        self._tick()
        source, target = Path(source), Path(target)
        before = target.read_bytes() if target.is_file() else None
        self._move(source, target)
        if source in self._unsynced_files:
            self._unsynced_files.add(target)

        def undo() -> None:
            if target.exists() and source.parent.is_dir():
                self._move(target, source)
                if before is not None:
                    target.write_bytes(before)

        self._pending.append(Pending(target.parent, undo))

    def _removing(self, unlink: Callable[..., None]) -> Callable[..., None]:
        def removed(path: Any, *, dir_fd: int | None = None) -> None:
            self._tick()
            if dir_fd is not None:  # a staging folder that is thrown away: nothing hangs on its order
                unlink(path, dir_fd=dir_fd)
                return
            content = Path(path).read_bytes()
            unlink(path)
            self._pending.append(Pending(Path(path).parent, lambda: _restore(Path(path), content)))

        return removed

    def _syncing(self, sync: Callable[[int], None]) -> Callable[[int], None]:
        def synced(descriptor: int) -> None:
            self._tick()
            sync(descriptor)
            path = Path(f"/proc/self/fd/{descriptor}").readlink()
            self._unsynced_files.discard(path)
            self._pending = [pending for pending in self._pending if pending.folder != path]

        return synced

    def _opening(self, opened: Callable[..., Any]) -> Callable[..., Any]:
        def opening(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            if isinstance(file, (str, Path)) and set(mode) & set("wxa+"):
                self._tick()
                self._unsynced_files.add(Path(file))
            return opened(file, mode, *args, **kwargs)

        return opening

    def _counted(self, operation: Callable[..., None]) -> Callable[..., None]:
        def counted(*args: Any, **kwargs: Any) -> None:
            self._tick()
            operation(*args, **kwargs)

        return counted


def _restore(path: Path, content: bytes) -> None:
    if not path.exists():
        path.write_bytes(content)

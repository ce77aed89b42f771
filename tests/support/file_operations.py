"""A recorder of file operations that can stop the world at the n-th one, as a kill or a power loss would."""

from __future__ import annotations

import builtins
import io
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

LOSSES = ("all", "content", "oldest")
At = Callable[[Path], Path]
"""Where a path of the recorded folder lies in the folder that something is taken from."""


class Crash(BaseException):
    """Not an Exception: no handler in the code under test may catch it."""


@dataclass(frozen=True)
class Pending:
    """A new entry, a rename or a removal that is durable only when `folder` has been synced."""

    folder: Path
    undo: Callable[[At], None]
    is_new: bool = False


@dataclass(frozen=True)
class Moment:
    """Between two operations: what was done, and what a power loss may take of it. `copy`: the folder as it was."""

    log: tuple[str, ...]
    pending: tuple[Pending, ...]
    unsynced_files: frozenset[Path]
    copy: Path | None = None

    def lose(self, what: str, at: At = lambda path: path) -> None:
        """Take what was not synced since. `at`: where the folder was copied to.

        all: the content of files, new entries, renames and removals; content: half of each file, while all names
        stay; oldest: the oldest rename or removal alone, since a disk need not keep the order.
        """
        oldest = [pending for pending in self.pending if not pending.is_new][:1]
        for pending in {"all": self.pending[::-1], "oldest": oldest, "content": ()}[what]:
            pending.undo(at)
        for path in map(at, self.unsynced_files if what != "oldest" else ()):
            if path.is_file():
                path.write_bytes(path.read_bytes()[: path.stat().st_size // 2] if what == "content" else b"")


class FileOperations:
    """Counts, from any thread, opens for writing, syncs, renames, links, removals and new folders.

    Before number `crash_at` it raises `fault` (a `Crash` when there is none), and before every later one: a world that
    has ended does not go on. With a `root` only operations below it count, and files that appear there by other ways
    (libraries in Rust write by themselves) are found and taken as not synced. With `copies` nothing is raised: before
    every operation the root is copied there, so that `moments` holds the state after every prefix of one run. Nothing
    is really synced then.
    """

    def __init__(
        self,
        crash_at: int | None,
        root: Path | None = None,
        fault: Callable[[str], BaseException | None] = lambda operation: Crash(operation),
        copies: Path | None = None,
    ) -> None:
        self.crash_at = crash_at
        self.count = 0
        self.log: list[str] = []
        self.crashed = False
        self.moments: list[Moment] = []
        self._root, self._fault, self._copies = root, fault, copies
        self._lock = threading.RLock()
        self._unsynced_files: set[Path] = set()
        self._pending: list[Pending] = []
        self._known = set(_files(root))
        self._move = os.replace

    @contextmanager
    def active(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[FileOperations]:
        with monkeypatch.context() as patch:
            for name, wrap in (
                ("unlink", self._removing),
                ("remove", self._removing),
                ("fsync", self._syncing),
                ("rmdir", self._removing_folder),
                ("mkdir", self._making_folder),
                ("symlink", self._linking),
            ):
                patch.setattr(os, name, wrap(getattr(os, name)))
            for module in (io, builtins):
                patch.setattr(module, "open", self._opening(module.open))
            for name in ("replace", "rename"):
                patch.setattr(os, name, self._moving)
            yield self
            self._find_files_of_others()
            if self._copies is not None:
                self._take_copy()

    def now(self, copy: Path | None = None) -> Moment:
        return Moment(tuple(self.log), tuple(self._pending), frozenset(self._unsynced_files), copy)

    def lose(self, what: str) -> None:
        self.now().lose(what)

    def _tick(self, operation: str, path: Any) -> Path | None:
        """The path in full when the operation is one of ours. Raises: the fault."""
        full = Path(path).absolute()
        if self._root is not None and not full.is_relative_to(self._root):
            return None
        self._find_files_of_others()
        if self.crash_at is not None and self.count >= self.crash_at and (fault := self._fault(operation)) is not None:
            self.crashed = True
            raise fault
        if self._copies is not None:
            self._take_copy()
        self.count += 1
        self.log.append(f"{operation} {full if self._root is None else full.relative_to(self._root)}")
        return full

    def _take_copy(self) -> None:
        assert self._root is not None
        assert self._copies is not None
        copy = self._copies / str(self.count)
        if self._root.exists():
            shutil.copytree(self._root, copy, symlinks=True)
        else:
            copy.mkdir(parents=True)
        self.moments.append(self.now(copy))

    def _find_files_of_others(self) -> None:
        for path in _files(self._root):
            if path not in self._known:
                self._is_new_file(path)

    def _is_new_file(self, path: Path) -> None:
        self._known.add(path)
        self._unsynced_files.add(path)
        self._pending.append(Pending(path.parent, lambda at: at(path).unlink(missing_ok=True), is_new=True))

    def _moving(self, source: Any, target: Any) -> None:
        with self._lock:
            full = self._tick("rename", target)
            if full is None:
                self._move(source, target)
                return
            source, target = Path(source).absolute(), full
            before = _content(target)
            self._move(source, target)
            self._unsynced_files = {_moved(path, source, target) for path in self._unsynced_files}
            self._known |= {_moved(path, source, target) for path in self._known}
            self._pending.append(Pending(target.parent, lambda at: self._move_back(at(source), at(target), before)))

    def _move_back(self, source: Path, target: Path, before: bytes | str | None) -> None:
        if os.path.lexists(target) and source.parent.is_dir():
            self._move(target, source)
            _restore(target, before)

    def _removing(self, unlink: Callable[..., None]) -> Callable[..., None]:
        def removed(path: Any, *, dir_fd: int | None = None) -> None:
            with self._lock:
                full = self._tick("unlink", _in_folder(path, dir_fd))
                before = None if full is None else _content(full)
                unlink(path, dir_fd=dir_fd)
                if full is not None:
                    self._pending.append(Pending(full.parent, lambda at: _restore(at(full), before)))

        return removed

    def _removing_folder(self, rmdir: Callable[..., None]) -> Callable[..., None]:
        def removed(path: Any, *, dir_fd: int | None = None) -> None:
            with self._lock:
                full = self._tick("rmdir", _in_folder(path, dir_fd))
                rmdir(path, dir_fd=dir_fd)
                if full is not None:
                    self._pending.append(Pending(full.parent, lambda at: at(full).mkdir(parents=True, exist_ok=True)))

        return removed

    def _making_folder(self, mkdir: Callable[..., None]) -> Callable[..., None]:
        def made(path: Any, mode: int = 0o777, *, dir_fd: int | None = None) -> None:
            with self._lock:
                full = self._tick("mkdir", _in_folder(path, dir_fd))
                mkdir(path, mode, dir_fd=dir_fd)
                if full is not None:
                    self._pending.append(
                        Pending(full.parent, lambda at: shutil.rmtree(at(full), ignore_errors=True), is_new=True)
                    )

        return made

    def _linking(self, symlink: Callable[..., None]) -> Callable[..., None]:
        def linked(source: Any, target: Any, *args: Any, **kwargs: Any) -> None:
            with self._lock:
                full = self._tick("symlink", target)
                symlink(source, target, *args, **kwargs)
                if full is not None:
                    undo = Pending(full.parent, lambda at: at(full).unlink(missing_ok=True), is_new=True)
                    self._pending.append(undo)

        return linked

    def _syncing(self, sync: Callable[[int], None]) -> Callable[[int], None]:
        def synced(descriptor: int) -> None:
            with self._lock:
                full = self._tick("fsync", Path(f"/proc/self/fd/{descriptor}").readlink())
                if self._copies is None:
                    sync(descriptor)
                if full is not None:
                    self._unsynced_files.discard(full)
                    self._pending = [pending for pending in self._pending if pending.folder != full]

        return synced

    def _opening(self, opened: Callable[..., Any]) -> Callable[..., Any]:
        def opening(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            if not isinstance(file, (str, Path)) or not set(mode) & set("wxa+"):
                return opened(file, mode, *args, **kwargs)
            with self._lock:
                full = self._tick("open", file)
                stream = opened(file, mode, *args, **kwargs)
                if full is not None:
                    self._unsynced_files.add(full)
                    if full not in self._known:
                        self._is_new_file(full)
                return stream

        return opening


def _files(root: Path | None) -> list[Path]:
    return [] if root is None else [Path(at) / name for at, _, names in os.walk(root) for name in names]


def _in_folder(path: Any, dir_fd: int | None) -> Path:
    return Path(path) if dir_fd is None else Path(f"/proc/self/fd/{dir_fd}").readlink() / path


def _moved(path: Path, source: Path, target: Path) -> Path:
    return target / path.relative_to(source) if path.is_relative_to(source) else path


def _content(path: Path) -> bytes | str | None:
    """Of a file, or where a link leads to; None when there is neither."""
    if path.is_symlink():
        return str(path.readlink())
    return path.read_bytes() if path.is_file() else None


def _restore(path: Path, content: bytes | str | None) -> None:
    if content is None or os.path.lexists(path):
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, str):
        path.symlink_to(content)
    else:
        path.write_bytes(content)

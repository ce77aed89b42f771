"""List the folder of stores, and remove entries. Training does not come here."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from filelock import Timeout

from apollo_sft.data.store.open import BUILDING, key_lock
from apollo_sft.data.store.store_files import LAST_USED, META, try_to_own

KEY = re.compile(r"[0-9a-f]{32}")
REMOVING = ".removing-"
State = Literal["whole", "damaged", "unfinished", "being built"]


@dataclass(frozen=True, slots=True)
class Entry:
    """A store, or the remains of one."""

    path: Path
    key: str
    state: State

    in_use: bool
    """A process builds it or has it open."""

    num_bytes: int

    made: float
    """When it was written, in seconds since 1970."""

    used: float
    """When it was opened last, in seconds since 1970."""

    files: list[str] = field(default_factory=list)
    rows: int = 0
    samples: int = 0
    tokens: int = 0


def entries(root: Path) -> list[Entry]:
    """Return all entries, the one that was used last first."""
    if not root.is_dir():
        return []

    found = []
    for path in root.iterdir():
        key = KEY.search(path.name)
        if key is not None and _is_ours(path, key[0]):
            found.append(_entry(path, key[0]))

    return sorted(found, key=lambda entry: (-entry.used, entry.path.name))


def _is_ours(path: Path, key: str) -> bool:
    """Return whether a path is an entry. Locks are none, and stay: another process may be waiting for one."""
    if path.name.startswith((BUILDING, REMOVING)) or path.name == key:
        return path.is_dir()
    return path.name == f"{key}.error"


def _entry(path: Path, key: str) -> Entry:
    is_locked = _is_locked(path.with_name(key))
    stat = path.stat()
    if path.name != key:
        state: State = "unfinished"
        if is_locked and path.name.startswith(BUILDING):
            state = "being built"
        return Entry(path, key, state, is_locked, _num_bytes(path), stat.st_mtime, stat.st_mtime)

    mark = path / LAST_USED
    used = stat.st_mtime
    if mark.is_file():
        used = mark.stat().st_mtime

    in_use = is_locked or _is_open(mark)
    try:
        meta = json.loads((path / META).read_text(encoding="utf-8"))["summary"]
        counts = [int(meta[name]) for name in ("num_rows", "num_samples", "num_tokens")]
        made = (path / META).stat().st_mtime
        return Entry(path, key, "whole", in_use, _num_bytes(path), made, used, [str(f) for f in meta["files"]], *counts)
    except (OSError, ValueError, KeyError, TypeError):
        return Entry(path, key, "damaged", in_use, _num_bytes(path), stat.st_mtime, used)


def _num_bytes(path: Path) -> int:
    """Return the bytes that a path takes on the disk."""
    return sum(file.lstat().st_blocks * 512 for file in (path, *path.rglob("*")))


def _is_locked(folder: Path) -> bool:
    lock = key_lock(folder)
    if not Path(lock.lock_file).is_file():
        return False

    try:
        with lock.acquire(blocking=False):
            return False
    except Timeout:
        return True


def _is_open(mark: Path) -> bool:
    if not mark.is_file():
        return False
    handle = try_to_own(mark)
    if handle is not None:
        os.close(handle)
    return handle is None


def remove(entry: Entry) -> bool:
    """Remove an entry, and return whether it is gone: it stays where a process builds it or has it open.

    Raises: OSError.
    """
    try:
        with key_lock(entry.path.with_name(entry.key)).acquire(blocking=False):
            return _remove_locked(entry.path)
    except Timeout:
        return False


def _remove_locked(path: Path) -> bool:
    if path.is_file():
        path.unlink()
        return True

    mark = path / LAST_USED
    # Who has a store open holds a lock on this file.
    handle = None
    if mark.is_file():
        handle = try_to_own(mark)
        if handle is None:
            return False

    try:
        hidden = path
        if KEY.fullmatch(path.name):
            hidden = path.with_name(f"{REMOVING}{path.name}")
        path.rename(hidden)  # at once: nobody opens a half of it
        shutil.rmtree(hidden)
    finally:
        if handle is not None:
            os.close(handle)

    return True


def hashes(root: Path) -> Iterator[Path]:
    """Yield the files with remembered hashes of data files."""
    yield from (root / "hashes").glob("*")

"""One live run per folder: a lock of the system, and a sign of life for hosts on which that lock does not hold."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from apollo_sft.checkpoint import publish
from apollo_sft.errors import ConfigError, TrainingError
from apollo_sft.types import ignore

LOCK = publish.PREFIX + "lock"
OWNER = publish.PREFIX + "owner.json"
BEAT_SECONDS = 10.0
"""How often the owner writes its sign of life."""
BEATS_MISSED = 6
"""A run of another host that wrote none for so many beats is dead. No clock is compared: what counts is a change."""
LOCKED = (errno.EACCES, errno.EAGAIN)
WITHOUT_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL)
"""What network file systems answer that know no such lock."""


class FolderLock:
    """The right to write into `root`, held until `release` or the end of the process. `notes`: what taking it met."""

    def __init__(self, root: Path, every_seconds: float = BEAT_SECONDS, say: Callable[[str], object] = ignore) -> None:
        """`say` is told when a run of another host has to be watched: that takes `BEATS_MISSED` of its beats.

        Raises: ConfigError naming process, host and age when a live run holds the folder.
        """
        self.notes: list[str] = []
        self._root = root
        self._every = every_seconds
        self._token = secrets.token_hex(8)
        self._released = threading.Event()
        self._descriptor = os.open(root / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            locked = self._lock_here()
            self._wait_for_earlier(locked, say)
            self._write()
        except BaseException:
            with suppress(OSError):  # of a disk that became read-only: what the caller is told is why that matters
                if (_read(self._root) or {}).get("token") == self._token:
                    (self._root / OWNER).unlink(missing_ok=True)
            os.close(self._descriptor)
            raise
        self._thread = threading.Thread(target=self._live, name="folder-lock", daemon=True)
        self._thread.start()

    def release(self) -> None:
        """Let another run take the folder."""
        if self._released.is_set():
            return
        self._released.set()
        self._thread.join()
        with suppress(OSError):  # a disk that became read-only: the next run finds that this process is gone
            if self._is_mine():
                (self._root / OWNER).unlink(missing_ok=True)
        os.close(self._descriptor)

    def _lock_here(self) -> bool:
        """Whether the file system knows locks. Raises: ConfigError when another run of this host holds it."""
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in LOCKED:
                raise _in_use(self._root, _read(self._root)) from error
            if error.errno not in WITHOUT_LOCKS:
                raise
            return False
        return True

    def _wait_for_earlier(self, locked: bool, say: Callable[[str], object]) -> None:
        """An owner that did not release: dead if its process is gone, or if its sign of life no longer changes."""
        found = _read(self._root)
        if found is None:
            return
        if found.get("machine") == _machine():
            if _started(found.get("pid")) == found.get("process_started"):
                if locked and found.get("pid") == os.getpid():
                    return  # this process let go of it, on a disk that was read-only by then
                raise _in_use(self._root, found)
            self.notes.append(f"took the folder over from {_who(found)}, which is gone")
            return
        patience = BEATS_MISSED * float(found.get("every_seconds", BEAT_SECONDS))
        say(f"{_who(found)} may still use {self._root}: watching it for {patience:.0f} s")
        deadline = time.monotonic() + patience
        while time.monotonic() < deadline:
            time.sleep(min(0.5, patience / 20))
            now = _read(self._root)
            if now is None:
                return
            if now != found:
                raise _in_use(self._root, now)
        self.notes.append(f"took the folder over from {_who(found)}, which gave no sign of life for {patience:.0f} s")

    def _write(self) -> None:
        owner = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "machine": _machine(),
            "process_started": _started(os.getpid()),
            "every_seconds": self._every,
            "seen": time.time(),
            "token": self._token,
        }
        publish.write_durably(self._root / OWNER, json.dumps(owner, indent=1) + "\n")

    def _is_mine(self) -> bool:
        found = _read(self._root)
        return found is None or found.get("token") == self._token

    def _live(self) -> None:
        while not self._released.wait(self._every):
            with suppress(OSError):  # a full disk or a network that is away: the next beat may get through
                if not self._is_mine():
                    self._give_up()
                self._write()

    def _give_up(self) -> None:
        """Another run took this one for dead. Two that write into one folder would spoil it."""
        sys.stderr.write(f"apollo-sft: {self._root} was taken over by {_who(_read(self._root) or {})}; this run ends\n")
        sys.stderr.flush()
        os._exit(TrainingError.exit_code)


def _read(root: Path) -> dict[str, Any] | None:
    try:
        found = json.loads((root / OWNER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _who(owner: dict[str, Any]) -> str:
    return f"process {owner.get('pid')} on {owner.get('host')}"


def _in_use(root: Path, owner: dict[str, Any] | None) -> ConfigError:
    found = "no sign of life yet"
    if owner is not None:
        found = f"{_who(owner)}, last sign of life {max(0.0, time.time() - float(owner.get('seen', 0))):.0f} s ago"
    return ConfigError(
        f"trainer.default_local_dir={root} is in use by a run that is still going on",
        found=found,
        fix="wait for it, end it, or choose another trainer.default_local_dir",
    )


def _machine() -> str:
    """Processes with the same text see each other: one boot of one machine, one space of process numbers."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    space = Path("/proc/self/ns/pid")
    parts = [socket.gethostname(), boot.read_text().strip() if boot.is_file() else ""]
    return "/".join([*parts, str(space.readlink()) if space.is_symlink() else ""])


def _started(pid: object) -> str | None:
    """When a living process began, in ticks since the boot: a number that was given out again began later."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]

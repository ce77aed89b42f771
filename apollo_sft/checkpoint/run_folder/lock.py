"""One live run per folder: a file lock of the system, and a heartbeat for file systems on which that does not hold.

The owner writes `.apollo-owner.json` every ten seconds. On one host, the lock and the table of processes show whether
it is alive. From another host, only the heartbeat does: the file is watched for six beats, and a change means alive.
"""

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
"""How often the owner writes its heartbeat."""
BEATS_MISSED = 6
"""A run of another host that missed this many beats is dead. No clocks are compared: any change counts as a beat."""
LOCKED = (errno.EACCES, errno.EAGAIN)
WITHOUT_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL)
"""Errors of network file systems that do not support such locks."""


class FolderLock:
    """The right to write into `root`, held until `release` or the end of the process."""

    notes: list[str]
    """What happened while the lock was taken, in words, for the log."""

    def __init__(self, root: Path, every_seconds: float = BEAT_SECONDS, say: Callable[[str], object] = ignore) -> None:
        """Take the lock. `say` is called before a run of another host is watched, for `BEATS_MISSED` of its beats.

        Raises: ConfigError naming process, host and age when a live run holds the folder.
        """
        self.notes = []
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
            # On a disk that became read-only this fails too. The first error is the one to report, so it is kept.
            with suppress(OSError):
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

        # The thread must have ended before the file goes, or its next beat would write the file again.
        self._released.set()
        self._thread.join()

        # On a disk that became read-only the file stays. The next run finds that this process has ended.
        with suppress(OSError):
            if self._is_mine():
                (self._root / OWNER).unlink(missing_ok=True)

        os.close(self._descriptor)

    def _lock_here(self) -> bool:
        """Lock the file; return whether the file system supports that.

        Raises: ConfigError when another run of this host holds it.
        """
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
        """Return once an owner that did not release is known to be dead: its process has ended, or it missed beats.

        Raises: ConfigError when it lives.
        """
        found = _read(self._root)
        if found is None:
            return

        if found.get("machine") == _machine():
            is_alive = _started(found.get("pid")) == found.get("process_started")
            if is_alive and locked and found.get("pid") == os.getpid():
                return  # this process released it, on a disk that was read-only by then
            if is_alive:
                raise _in_use(self._root, found)
            self.notes.append(f"took the folder over from {_who(found)}, which has ended")
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

        self.notes.append(f"took the folder over from {_who(found)}, which wrote no heartbeat for {patience:.0f} s")

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
            # A full disk or a network that is down for a while must not end the run: the next beat may succeed.
            with suppress(OSError):
                if not self._is_mine():
                    self._give_up()
                self._write()

    def _give_up(self) -> None:
        """End the process: another run has taken this one for dead, and two writers would damage the folder."""
        sys.stderr.write(f"apollo-sft: {self._root} was taken over by {_who(_read(self._root) or {})}; this run ends\n")
        sys.stderr.flush()
        os._exit(TrainingError.exit_code)


def _read(root: Path) -> dict[str, Any] | None:
    return publish.json_object(root / OWNER)


def _who(owner: dict[str, Any]) -> str:
    return f"process {owner.get('pid')} on {owner.get('host')}"


def _in_use(root: Path, owner: dict[str, Any] | None) -> ConfigError:
    found = "no heartbeat yet"
    if owner is not None:
        age_seconds = max(0.0, time.time() - float(owner.get("seen", 0)))
        found = f"{_who(owner)}, last heartbeat {age_seconds:.0f} s ago"

    return ConfigError(
        f"trainer.default_local_dir={root} is in use by a run that is still active",
        found=found,
        fix="wait for it, end it, or choose another trainer.default_local_dir",
    )


def _machine() -> str:
    """Return a text that is the same for processes that see each other: host, boot and PID namespace."""
    boot = ""
    boot_file = Path("/proc/sys/kernel/random/boot_id")
    if boot_file.is_file():
        boot = boot_file.read_text().strip()

    namespace = ""
    namespace_link = Path("/proc/self/ns/pid")
    if namespace_link.is_symlink():
        namespace = str(namespace_link.readlink())

    return f"{socket.gethostname()}/{boot}/{namespace}"


def _started(pid: object) -> str | None:
    """Return when a living process began, in ticks since the boot: a reused process number has a later start."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]

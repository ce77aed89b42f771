"""The processes of a started command: who they are, and how they are ended. Read from /proc, nothing is guessed."""

import os
import signal
import time
from contextlib import suppress
from pathlib import Path


def descendants(root: int) -> list[int]:
    """All living processes below `root`, parents first."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal() and (facts := _stat(int(entry.name))) is not None and facts[0] != "Z":
            children.setdefault(facts[1], []).append(int(entry.name))
    found, waiting = [], [root]
    while waiting:
        below = children.get(waiting.pop(0), [])
        found += below
        waiting += below
    return found


def ranks(root: int) -> dict[int, int]:
    """The processes below `root` that train, by rank."""
    found = {}
    for pid in descendants(root):
        if (rank := _variable(pid, "RANK")) is not None and _is_python(pid):
            found.setdefault(int(rank), pid)  # the first is the rank itself; what it started may bear its environment
    return found


def kill(pids: list[int]) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def wait_until_gone(pids: list[int], patience_seconds: float) -> list[int]:
    """Those that still live after that long."""
    deadline = time.monotonic() + patience_seconds
    while living := [pid for pid in pids if (facts := _stat(pid)) is not None and facts[0] != "Z"]:
        if time.monotonic() > deadline:
            return living
        time.sleep(0.02)
    return []


def _stat(pid: int) -> tuple[str, int] | None:
    """(state, parent), or None when there is no such process."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    state, parent = text.rpartition(")")[2].split()[:2]
    return state, int(parent)


def _variable(pid: int, name: str) -> str | None:
    try:
        entries = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return None
    found = [entry.partition(b"=")[2].decode() for entry in entries if entry.startswith(name.encode() + b"=")]
    return found[0] if found else None


def _is_python(pid: int) -> bool:
    with suppress(FileNotFoundError, ProcessLookupError):
        return "python" in (Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0].decode())
    return False

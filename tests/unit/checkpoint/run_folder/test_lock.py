"""Who holds a run folder: this process, another one of this machine, a run of another host that lives or is dead."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from apollo_sft.checkpoint.run_folder import lock as module
from apollo_sft.checkpoint.run_folder.lock import LOCK, OWNER, FolderLock
from apollo_sft.errors import ConfigError

HOLD = """
import sys
from pathlib import Path
from apollo_sft.checkpoint.run_folder.lock import FolderLock
lock = FolderLock(Path(sys.argv[1]), every_seconds=float(sys.argv[2]))
print("held", flush=True)
sys.stdin.read()
"""


def owner(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / OWNER).read_text())
    return found


def hold(folder: Path, every_seconds: float = 10) -> "subprocess.Popen[str]":
    """A process of its own that holds the folder until its input ends."""
    command = [sys.executable, "-c", HOLD, str(folder), str(every_seconds)]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def without_system_lock(folder: Path) -> None:
    """As on a host that the other's lock does not reach: the file is another one."""
    (folder / LOCK).unlink()


def on_another_host(folder: Path, **changes: Any) -> None:
    """The folder's owner, as it would look if it ran elsewhere."""
    (folder / OWNER).write_text(json.dumps(owner(folder) | {"host": "node7", "machine": "node7/boot/pids"} | changes))


def test_it_is_held_and_released(tmp_path: Path) -> None:
    lock = FolderLock(tmp_path)
    assert lock.notes == []
    assert (owner(tmp_path)["pid"], owner(tmp_path)["host"]) == (os.getpid(), socket.gethostname())
    with pytest.raises(ConfigError, match=f"process {os.getpid()} on {socket.gethostname()}, last heartbeat 0 s ago"):
        FolderLock(tmp_path)
    lock.release()
    lock.release()
    assert not (tmp_path / OWNER).exists()
    FolderLock(tmp_path).release()


def test_where_the_system_has_no_locks_the_living_process_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unsupported(*_: Any) -> None:
        raise OSError(module.errno.ENOSYS, "no locks here")

    monkeypatch.setattr(module.fcntl, "flock", unsupported)
    process = hold(tmp_path)
    without_system_lock(tmp_path)
    with pytest.raises(ConfigError, match=f"process {process.pid} on {socket.gethostname()}"):
        FolderLock(tmp_path)
    process.kill()
    process.wait()
    lock = FolderLock(tmp_path)
    assert lock.notes == [f"took the folder over from process {process.pid} on {socket.gethostname()}, which has ended"]
    lock.release()


def test_a_number_that_was_given_to_another_process_is_no_owner(tmp_path: Path) -> None:
    lock = FolderLock(tmp_path)
    lock.release()
    lock = FolderLock(tmp_path)
    text = json.dumps(owner(tmp_path) | {"process_started": "1"})
    lock.release()
    (tmp_path / OWNER).write_text(text)  # this process lives, but it is not the one that held the folder
    lock = FolderLock(tmp_path)
    assert "which has ended" in lock.notes[0]
    lock.release()


def test_a_process_that_could_not_remove_its_name_may_go_on_itself(tmp_path: Path) -> None:
    lock = FolderLock(tmp_path)
    text = (tmp_path / OWNER).read_text()
    with pytest.raises(ConfigError, match="in use"):
        FolderLock(tmp_path)
    lock.release()
    (tmp_path / OWNER).write_text(text)  # what a disk that became read-only keeps
    FolderLock(tmp_path).release()


def test_a_live_run_of_another_host_is_refused(tmp_path: Path) -> None:
    process = hold(tmp_path, every_seconds=0.2)
    without_system_lock(tmp_path)
    said: list[str] = []
    text = (tmp_path / OWNER).read_text().replace(str(owner(tmp_path)["machine"]), "node7/boot/pids")
    (tmp_path / OWNER).write_text(text)  # its next beat is what a live owner of another machine shows
    began = time.monotonic()
    with pytest.raises(ConfigError) as refusal:
        FolderLock(tmp_path, say=said.append)
    assert time.monotonic() - began < module.BEATS_MISSED * 0.2
    assert re.search(rf"process {process.pid} on \S+, last heartbeat \d s ago", str(refusal.value))
    assert "watching it for 1 s" in said[0]
    process.kill()
    process.wait()


def test_a_dead_run_of_another_host_is_taken_over_after_a_while(tmp_path: Path) -> None:
    process = hold(tmp_path)
    process.kill()
    process.wait()
    on_another_host(tmp_path, every_seconds=0.1)
    began = time.monotonic()
    lock = FolderLock(tmp_path)
    assert time.monotonic() - began >= module.BEATS_MISSED * 0.1
    expected = f"took the folder over from process {process.pid} on node7, which wrote no heartbeat for 1 s"
    assert lock.notes == [expected]
    assert owner(tmp_path)["pid"] == os.getpid()
    lock.release()


def test_a_run_that_was_taken_for_dead_ends(tmp_path: Path) -> None:
    process = hold(tmp_path, every_seconds=0.2)
    os.kill(process.pid, signal.SIGSTOP)
    without_system_lock(tmp_path)
    on_another_host(tmp_path)
    lock = FolderLock(tmp_path)
    before = owner(tmp_path)
    os.kill(process.pid, signal.SIGCONT)
    assert process.wait(timeout=30) == 1
    said = process.communicate()[1]
    assert f"was taken over by process {os.getpid()} on {socket.gethostname()}; this run ends" in said
    assert owner(tmp_path) == before
    lock.release()


def test_a_beat_that_cannot_be_written_ends_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock = FolderLock(tmp_path, every_seconds=0.05)
    first = owner(tmp_path)["seen"]

    def full(*_: Any) -> None:
        raise OSError(module.errno.ENOSPC, "no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(module.publish, "write_durably", full)
        time.sleep(0.3)
    deadline = time.monotonic() + 10
    while owner(tmp_path)["seen"] - first < 0.3:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    lock.release()

"""Python as a real process of the test's own, without the seconds of imports: a fork server has them behind it.

It stands for `python -m …` of our modules, `python -c …`, `python FILE.py …`, and the programs of the installation.
`start` is `subprocess.Popen` and `run` is `subprocess.run`. What they start is a child of the caller like any other:
it has a pid, an exit code, signals, pipes, a session and a parent whose death it may hear of. Commands that the server
cannot stand for (see `fork_server.declines`) are started anew, and so is everything when there is no server.
"""

from __future__ import annotations

import atexit
import ctypes
import inspect
import json
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
ROOM = "APOLLO_TESTS_ROOM"
"""A variable of the server alone. In its place a forked process shows its own variables in /proc/PID/environ."""

LONGEST_MESSAGE = 100_000
"""In bytes. What is longer would not fit into the socket's buffer as one packet."""

CHILD_SUBREAPER = 36
"""PR_SET_CHILD_SUBREAPER in linux/prctl.h."""

FORKED = ("apollo_sft", "torch.distributed.run", "tests.support.rank", "verl.trainer.fsdp_sft_trainer", "examples.rl.")
"""Beginnings of the modules that are forked."""

PROGRAMS = Path(sys.executable).parent
MODULES = {"apollo-sft": "apollo_sft.cli.main", "torchrun": "torch.distributed.run"}
"""What the programs of the installation run."""

_ASKED_FOR = inspect.signature(subprocess.Popen._execute_child)

_environment = dict(os.environ)
"""As it was when the tests were collected: a test that has changed it is not the one that the server shall resemble."""

_lock = threading.Lock()
_server: tuple[socket.socket, int] | None = None
"""The connection to the server, and the process that it belongs to: a fork of that process must not use it."""


class Process(subprocess.Popen[Any]):
    """A `Popen` whose process is forked from the server where that is possible."""

    def _execute_child(self, *values: Any, **named: Any) -> None:
        asked = _ASKED_FOR.bind(self, *values, **named).arguments
        pid = _fork(asked)

        if pid is None:
            super()._execute_child(*values, **named)
            return

        self.pid = pid
        self._child_created = True
        ends = ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")
        self._close_pipe_fds(*(asked[end] for end in ends))


def start(command: list[str], **how: Any) -> Process:
    """Start a command as `subprocess.Popen` would."""
    return Process(command, **how)


def run(
    command: list[str], timeout: float | None = None, check: bool = False, capture_output: bool = False, **how: Any
) -> subprocess.CompletedProcess[Any]:
    """Run a command as `subprocess.run` would, and wait for its end."""
    if capture_output:
        how |= {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}

    with Process(command, **how) as process:
        try:
            written = process.communicate(timeout=timeout)
        except BaseException:
            process.kill()
            raise

    finished = subprocess.CompletedProcess(process.args, process.returncode, *written)
    if check:
        finished.check_returncode()
    return finished


def parts(command: Any) -> tuple[str, list[str]] | None:
    """What is to be run (`-m`, `-c` or `file`), and the words from its name on; None when it cannot be forked."""
    if not isinstance(command, (list, tuple)):
        return None
    program = Path(os.fsdecode(command[0]))
    if program.parent == PROGRAMS and program.name in MODULES and program.is_file():
        return "-m", [MODULES[program.name], *map(os.fsdecode, command[1:])]
    if command[0] != sys.executable:
        return None

    words = [os.fsdecode(word) for word in command[1:]]
    if words[:1] == ["-u"]:
        del words[0]
    if len(words) > 1 and (words[0] == "-c" or (words[0] == "-m" and words[1].startswith(FORKED))):
        return words[0], words[1:]
    if words and words[0].endswith(".py"):
        return "file", words
    return None


def _fork(asked: dict[str, Any]) -> int | None:
    """The pid of the forked process; None when this one has to be started anew."""
    plain = not asked["shell"] and asked["preexec_fn"] is None and asked["executable"] is None
    found = parts(asked["args"])
    if found is None or not plain:
        return None

    ends = (asked["p2cread"], asked["c2pwrite"], asked["errwrite"])
    streams = [number if end == -1 else end for number, end in enumerate(ends)]
    passed = sorted(asked["pass_fds"])
    environment = os.environ if asked["env"] is None else asked["env"]
    request = {
        "line": [os.fsdecode(word) for word in asked["args"]],
        "what": found[0],
        "words": found[1],
        "environment": {os.fsdecode(name): os.fsdecode(value) for name, value in environment.items()},
        "folder": str(Path.cwd() if asked["cwd"] is None else Path(asked["cwd"]).absolute()),
        "new_session": bool(asked["start_new_session"]),
        "numbers": [0, 1, 2, *passed],
    }
    message = json.dumps(request).encode()
    if len(message) > LONGEST_MESSAGE:
        return None

    with _lock:
        return _ask(message, [*streams, *passed])


def _ask(message: bytes, descriptors: list[int]) -> int | None:
    connection = _connected()
    if connection is None:
        return None

    answer = b""
    _adopt_orphans(True)  # the server lets go of what it has forked, and it becomes a child of this process
    try:
        socket.send_fds(connection, [message], descriptors)
        answer = connection.recv(64)
    except OSError:
        pass
    finally:
        _adopt_orphans(False)
        if not answer:  # nor can it be used when this one was interrupted: the answer would be taken for the next one
            _forget(connection)

    if answer:
        return int(answer) or None
    if _is_forked_itself():
        return None
    raise RuntimeError("the fork server of the tests has ended; what it said stands above")


def _forget(connection: socket.socket) -> None:
    global _server
    connection.close()
    _server = None


def _adopt_orphans(yes: bool) -> None:
    ctypes.CDLL(None).prctl(CHILD_SUBREAPER, int(yes), 0, 0, 0)


def _connected() -> socket.socket | None:
    global _server
    if _server is None and not _is_forked_itself():
        _server = (_start_server(), os.getpid())
    if _server is None or _server[1] != os.getpid():
        return None
    return _server[0]


def _is_forked_itself() -> bool:
    return "tests.support.fork_server" in sys.modules


def serve_from(connection: socket.socket) -> None:
    """Use this connection: a process of the server calls it, whose own children come from a server of its own."""
    global _server
    _server = (connection, os.getpid())


def _start_server() -> socket.socket:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        server = subprocess.Popen(
            [sys.executable, "-m", "tests.support.fork_server", str(theirs.fileno())],
            cwd=ROOT,
            env=_environment | {ROOM: "." * LONGEST_MESSAGE},
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )

    @atexit.register
    def end() -> None:
        ours.close()  # it has nobody to serve any more
        server.wait()

    return ours

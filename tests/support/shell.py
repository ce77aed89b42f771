"""Lines of bash whose `python3`, `torchrun` and `apollo-sft` are forked, as those of `tests.support.python` are.

First in the PATH of bash is a folder with a script under each of these names. The script (`shell_program.py`) sends its
words, folder, variables and streams to the test. The test forks the process, and the script ends as that one ends.
"""

from __future__ import annotations

import json
import os
import shlex
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tests.support import python

CLIENT = Path(__file__).with_name("shell_program.py")
PROGRAMS = {name: python.PROGRAMS / name for name in python.MODULES}
PROGRAMS |= {name: Path(sys.executable) for name in ("python", "python3")}


def run(line: str, folder: Path, environment: dict[str, str], seconds: float) -> subprocess.CompletedProcess[str]:
    """Run a line of bash, and wait for its end."""
    with _programs() as programs:
        return run_anew(line, folder, environment | {"PATH": f"{programs}:{environment['PATH']}"}, seconds)


def run_anew(line: str, folder: Path, environment: dict[str, str], seconds: float) -> subprocess.CompletedProcess[str]:
    """Run a line of bash whose programs are started as a user starts them."""
    return subprocess.run(
        ["bash", "-c", line],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )


@contextmanager
def _programs() -> Iterator[str]:
    """Write the folder of scripts, and answer them. Kill what is still running at the end."""
    with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        address = f"{folder}/socket"
        listener.bind(address)
        listener.listen()

        client = shlex.join([sys.executable, "-SE", str(CLIENT), address])
        for name in PROGRAMS:
            script = Path(folder, name)
            script.write_text(f'#!/bin/sh\nexec {client} {name} "$@"\n')
            script.chmod(0o700)

        processes: list[python.Process] = []
        accepting = threading.Thread(target=_accept, args=(listener, processes))
        accepting.start()
        try:
            yield folder
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            accepting.join()
            for process in processes:
                process.kill()


def _accept(listener: socket.socket, processes: list[python.Process]) -> None:
    """Fork a process for every script that connects, until the listener is shut down."""
    while True:
        try:
            connection, _ = listener.accept()
        except OSError:
            return

        message, streams, _, _ = socket.recv_fds(connection, 2 * python.LONGEST_MESSAGE, 3)
        asked = json.loads(message)
        program, *words = asked["words"]
        command = [str(PROGRAMS[program]), *words]
        ends = dict(zip(("stdin", "stdout", "stderr"), streams, strict=True))
        process = python.start(command, cwd=asked["folder"], env=asked["environment"], **ends)

        for stream in streams:
            os.close(stream)
        processes.append(process)
        threading.Thread(target=_report, args=(process, connection)).start()


def _report(process: python.Process, connection: socket.socket) -> None:
    """Send the pid, for signals, and the exit code. Nobody receives it where the script was killed."""
    with connection, suppress(BrokenPipeError):
        connection.send(str(process.pid).encode())
        connection.send(str(process.wait()).encode())

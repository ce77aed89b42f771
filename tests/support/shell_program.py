"""The script of `tests.support.shell`, a child of bash: it has the test fork a process, and ends as that one ends.

It is run without `site`, and imports little: it starts in hundredths of a second.
"""

import json
import os
import signal
import socket
import sys

PASSED_ON = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


def main(address: str, words: list[str]) -> None:
    """Send the words to the test, pass signals on, and end with the exit code or by the signal of the process."""
    signal.pthread_sigmask(signal.SIG_BLOCK, PASSED_ON)  # until there is a process that can get them
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    connection.connect(address)
    request = {
        "words": words,
        "folder": os.getcwd(),  # noqa: PTH109  # pathlib takes 20 ms to import
        "environment": dict(os.environ),
    }
    socket.send_fds(connection, [json.dumps(request).encode()], [0, 1, 2])

    pid = int(connection.recv(64))
    for number in PASSED_ON:
        signal.signal(number, lambda received, _: os.kill(pid, received))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, PASSED_ON)

    code = int(connection.recv(64))
    if code >= 0:
        sys.exit(code)
    if code != -signal.SIGKILL:
        signal.signal(-code, signal.SIG_DFL)
    os.kill(os.getpid(), -code)


main(sys.argv[1], sys.argv[2:])

"""A real terminal for tests: a pseudo-terminal stands where stderr was, and what it was sent can be read."""

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

from apollo_sft.report.log import terminal

SETTINGS = {"TERM": "xterm", "COLUMNS": "80", "LINES": "24"}
OVERRIDES = ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE")


class Screen:
    """What was written to the terminal. It reads all the time, so that a writer never waits for a full buffer."""

    def __init__(self, reader: int) -> None:
        self._reader = reader
        self._received = b""
        self.thread = threading.Thread(target=self._read)
        self.thread.start()

    def _read(self) -> None:
        while True:
            try:
                piece = os.read(self._reader, 4096)
            except OSError:  # how Linux says that the other end was closed
                return
            self._received += piece

    def text(self) -> str:
        """With the terminal's own line ends made plain. Complete after the end of `on_terminal`."""
        return self._received.decode().replace("\r\n", "\n")


@contextmanager
def on_terminal() -> Iterator[Screen]:
    """Inside, stderr is a terminal of 80 columns."""
    reader, writer = os.openpty()
    screen = Screen(reader)
    environment = {name: value for name, value in os.environ.items() if name not in OVERRIDES} | SETTINGS
    try:
        with (
            os.fdopen(writer, "w", buffering=1) as stream,
            mock.patch.dict(os.environ, environment, clear=True),
            mock.patch.object(sys, "stderr", stream),
        ):
            terminal.cache_clear()
            yield screen
    finally:
        terminal.cache_clear()
        screen.thread.join()
        os.close(reader)

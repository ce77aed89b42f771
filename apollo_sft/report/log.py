"""Messages for people. Only rank 0 prints them, above a progress bar that is active."""

from __future__ import annotations

import errno
import io
import logging
import os
import sys
import warnings
from collections.abc import Callable
from functools import cache
from typing import TextIO, cast

from rich.console import Console
from rich.text import Text

from apollo_sft.redact import redact

LOGGER = logging.getLogger("apollo_sft")


@cache
def terminal() -> Console:
    """Return the one console that all parts write through: stderr, so that stdout stays free for results."""
    return Console(file=cast(TextIO, _Stderr()), highlight=False)


class _Stderr(io.TextIOBase):
    """stderr as it is at the moment of a write, for as long as it can be written.

    A run does not end because its terminal was closed, its reader has seen enough (`| head`) or its log is full.
    """

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return _stream().encoding

    def isatty(self) -> bool:
        return _stream().isatty()

    def fileno(self) -> int:
        return _stream().fileno()

    def write(self, text: str) -> int:
        self._attempt(lambda stream: stream.write(text))
        return len(text)

    def flush(self) -> None:
        self._attempt(lambda stream: stream.flush())

    def _attempt(self, action: Callable[[TextIO], object]) -> None:
        try:
            action(_stream())
        except OSError as error:
            # Nobody will read this stream again. Libraries write to it as well, and would raise: it is redirected.
            if error.errno in (errno.EPIPE, errno.EIO):
                os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())


def _stream() -> TextIO:
    """Return stderr itself: while a bar is active, rich replaces it by an object that prints above the bar."""
    return cast(TextIO, getattr(sys.stderr, "rich_proxied_file", sys.stderr))


class _TerminalHandler(logging.Handler):
    """Write to `terminal()`, above an active bar; plain text when that is not a terminal.

    Long lines are never broken here: what a person copies out of them (a path, Python) stays whole.
    """

    def emit(self, record: logging.LogRecord) -> None:
        style = "yellow" if record.levelno >= logging.WARNING else ""
        terminal().print(Text.from_ansi(redact(self.format(record)), style=style), soft_wrap=True)


def setup_logging(is_main: bool) -> None:
    """Let rank 0 log to `terminal()`, the others errors only. Called once, at the start of a run."""
    LOGGER.handlers[:] = [_handler("%(message)s")]
    LOGGER.setLevel(logging.INFO if is_main else logging.ERROR)
    LOGGER.propagate = False
    _quiet_libraries(is_main)


def say(text: str) -> None:
    """Log one message for the person who started the run."""
    LOGGER.info(text)


def warn(text: str) -> None:
    """Log a warning; the run continues."""
    LOGGER.warning("warning: %s", text)


def _handler(form: str) -> logging.Handler:
    handler = _TerminalHandler()
    handler.setFormatter(logging.Formatter(form))
    return handler


def _quiet_libraries(is_main: bool) -> None:
    """Show progress bars of libraries on rank 0 of a terminal only, their warnings on rank 0, and no advice."""
    from huggingface_hub.utils.tqdm import disable_progress_bars
    from transformers.utils import logging as transformers_logging

    if not (is_main and terminal().is_terminal):
        disable_progress_bars()
        transformers_logging.disable_progress_bar()

    if not is_main:
        transformers_logging.set_verbosity_error()

    # Its own handler would print through the middle of the progress bar.
    transformers_logging.get_logger("transformers").handlers[:] = [_handler("transformers: %(message)s")]
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")

    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed.*")
    # DCP's warning in a run of one process, which needs no process group.
    warnings.filterwarnings("ignore", message=r".*assuming the intent is to (save|load) in a single process")

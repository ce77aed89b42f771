"""Lines for people. Rank 0 speaks; a progress bar that is alive is not torn."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from functools import cache

from rich.console import Console
from rich.logging import RichHandler

LOGGER = logging.getLogger("apollo_sft")


@cache
def terminal() -> Console:
    """The one console that all parts write through: stderr, so that stdout stays free for results."""
    return Console(stderr=True, highlight=False)


def setup_logging(is_main: bool) -> None:
    """Rank 0 logs to `terminal()`, the others stay silent below errors. Called once, at the start of a run."""
    handler: logging.Handler = logging.StreamHandler(sys.stderr)
    if terminal().is_terminal:
        handler = RichHandler(console=terminal(), show_time=False, show_path=False, show_level=False, markup=False)
    handler.setFormatter(logging.Formatter("%(message)s"))
    LOGGER.handlers[:] = [handler]
    LOGGER.setLevel(logging.INFO if is_main else logging.ERROR)
    LOGGER.propagate = False
    _quiet_libraries(is_main)


def say(text: str) -> None:
    """One message to the person who started the run."""
    LOGGER.info(text)


def warn(text: str) -> None:
    """Something that the person should look at; the run goes on."""
    LOGGER.warning("warning: %s", text)


def _quiet_libraries(is_main: bool) -> None:
    """Progress bars only on rank 0 of a terminal; hints that ask the caller to change a call are not for our users."""
    from huggingface_hub.utils.tqdm import disable_progress_bars
    from transformers.utils import logging as transformers_logging

    if not (is_main and terminal().is_terminal):
        disable_progress_bars()
        transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed.*")

"""The rendezvous store of a run: texts that ranks exchange without a collective."""

from __future__ import annotations

import time
from typing import Any

import torch.distributed as dist

READY = "ready"
"""The verdict that ends a wait with success; any other one is the exit code of a failure."""

POLL_SECONDS = 0.5
"""The longest pause of a rank that polls the store."""


def rendezvous_store() -> Any:
    """Return the store of the default process group."""
    return dist.distributed_c10d._get_default_store()


def wait_for(key: str, store: Any = None) -> str:
    """Wait until `key` is set, and return its value.

    This is no collective: no timeout ends the wait for a long preparation, and a signal is handled while it polls.
    """
    store = store or rendezvous_store()
    pause = 0.01

    while not store.check([key]):
        time.sleep(pause)
        pause = min(2 * pause, POLL_SECONDS)

    return str(store.get(key).decode())


def first_to_fail() -> bool:
    """Return whether this rank is the first to call this; also True when the store does not answer any more."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return True

    try:
        # `add` is atomic: exactly one rank gets 1.
        return bool(rendezvous_store().add("failed", 1) == 1)
    except (RuntimeError, OSError):
        return True

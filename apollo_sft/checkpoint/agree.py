"""A failure of one rank becomes a failure of all: none waits for ever for one that has given up."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from apollo_sft.errors import ApolloError, CheckpointError


def attempt(action: Callable[[], object]) -> Exception | None:
    """What stopped the action, to be raised by `agree` when all ranks are there to hear of it."""
    try:
        action()
    except Exception as error:
        return error
    return None


def agree(failure: Exception | None, model: Any) -> None:
    """Raise on every rank when one has failed: on that rank what it met, on the others a word about it.

    Raises: CheckpointError.
    """
    failed = failure is not None
    if dist.is_available() and dist.is_initialized():
        flag = torch.tensor(int(failed), device=next(model.parameters()).device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        failed = bool(flag.item())
    if isinstance(failure, ApolloError):
        raise failure
    if failure is not None:
        raise CheckpointError("the model could not be written", found=repr(failure)) from failure
    if failed:
        raise CheckpointError("the model was not saved: the rank that writes it failed and says why")

"""A failure of one rank becomes a failure of all: none waits for ever for one that has given up."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from apollo_sft.errors import ApolloError, CheckpointError

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
UNWRITABLE = (errno.EROFS, errno.EIO)


def attempt(action: Callable[[], object]) -> Exception | None:
    """What stopped the action, to be raised by `agree` when all ranks are there to hear of it."""
    try:
        action()
    except Exception as error:
        return error
    return None


def agree(failure: Exception | None, model: Any = None, group: Any = None) -> None:
    """Raise on every rank when one has failed: on that rank what it met, on the others a word about it.

    By default all ranks, where `model` lies; or those of a gloo group.
    Raises: CheckpointError.
    """
    failed = failure is not None
    if dist.is_available() and dist.is_initialized():
        device = torch.device("cpu") if model is None else next(model.parameters()).device
        flag = torch.tensor(int(failed), device=device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=group)
        failed = bool(flag.item())
    if isinstance(failure, ApolloError):
        raise failure
    if failure is not None:
        raise CheckpointError("the model could not be written", found=repr(failure)) from failure
    if failed:
        raise CheckpointError("the model was not saved: the rank that writes it failed and says why")


def check_room(folder: Path, num_bytes: int, purpose: str) -> None:
    """Raises: CheckpointError when the disk of `folder`, or of its first parent that exists, has less free."""
    free = free_bytes(folder)
    if free < num_bytes:
        raise no_room(folder, free, purpose, needed=num_bytes)


def no_room(folder: Path, free: int, purpose: str, needed: int | None) -> CheckpointError:
    return CheckpointError(
        f"the disk has no room for {purpose} in {folder}",
        found=f"{free:,} bytes free",
        expected=None if needed is None else f"{needed:,} bytes",
        fix="make room, lower trainer.max_ckpt_to_keep, or choose another trainer.default_local_dir",
    )


def free_bytes(folder: Path) -> int:
    """Bytes that this user may still write on the disk of `folder`."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def explained(
    failure: Exception | None, folder: Path, needed: int | None, purpose: str = "a checkpoint"
) -> Exception | None:
    """The failure, in words about the disk when that is full or read-only; libraries wrap it in errors of their own."""
    cause: BaseException | None = failure
    while cause is not None and not (isinstance(cause, OSError) and cause.errno in (*NO_ROOM, *UNWRITABLE)):
        cause = cause.__cause__ or cause.__context__
    if cause is None or (isinstance(failure, ApolloError) and not isinstance(failure, CheckpointError)):
        return failure
    assert isinstance(cause, OSError)
    if cause.errno in UNWRITABLE:
        return CheckpointError(f"{folder} cannot be written", found=cause.strerror)
    return no_room(folder, free_bytes(folder), purpose, needed)

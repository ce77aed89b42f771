"""Room on the disk, and what a full or read-only disk is called in a message."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path

from apollo_sft.errors import ApolloError, CheckpointError

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
UNWRITABLE = (errno.EROFS, errno.EIO)


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

"""Room for what is written: free disk space, free CPU memory, and the messages about a full or read-only disk."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path

from apollo_sft.errors import ApolloError, CheckpointError

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
UNWRITABLE = (errno.EROFS, errno.EIO)
MEMORY_RATIO = 0.8
"""Share of the free CPU memory of a host that copies of a model, or of parts of it, may take."""


def available_memory() -> int:
    """Return the bytes of CPU memory that programs of this host may still take, as Linux estimates it.

    Source: MemAvailable in proc(5).
    """
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    (kibibytes,) = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    return int(kibibytes) * 1024


def free_bytes(folder: Path) -> int:
    """Return the bytes that this user may still write on the disk of `folder`, which need not exist yet."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def check_room(folder: Path, num_bytes: int, purpose: str) -> None:
    """Raise a CheckpointError when the disk of `folder`, or of its first parent that exists, has less free."""
    free = free_bytes(folder)
    if free < num_bytes:
        raise no_room(folder, free, purpose, needed=num_bytes)


def no_room(folder: Path, free: int, purpose: str, needed: int | None) -> CheckpointError:
    """Build the error for a full disk. `needed`: in bytes, None when it is not known."""
    return CheckpointError(
        f"the disk has no room for {purpose} in {folder}",
        found=f"{free:,} bytes free",
        expected=None if needed is None else f"{needed:,} bytes",
        fix="make room, lower trainer.max_ckpt_to_keep, or choose another trainer.default_local_dir",
    )


def explained(
    failure: Exception | None, folder: Path, needed: int | None, purpose: str = "a checkpoint"
) -> Exception | None:
    """Return a message about the disk when a full or read-only one caused the failure, else the failure itself."""
    # Libraries wrap the error of the system in errors of their own: it is looked for along the chain of causes.
    cause: BaseException | None = failure
    while cause is not None and not _is_about_the_disk(cause):
        cause = cause.__cause__ or cause.__context__

    # An ApolloError of another kind, for example of the configuration, already states its own cause and fix.
    if cause is None or (isinstance(failure, ApolloError) and not isinstance(failure, CheckpointError)):
        return failure

    assert isinstance(cause, OSError)
    if cause.errno in UNWRITABLE:
        return CheckpointError(f"{folder} cannot be written", found=cause.strerror)
    return no_room(folder, free_bytes(folder), purpose, needed)


def _is_about_the_disk(error: BaseException) -> bool:
    return isinstance(error, OSError) and error.errno in (*NO_ROOM, *UNWRITABLE)

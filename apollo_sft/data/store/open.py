"""Tokenise once: turn rows into a memory-mapped store, found again by the key of its inputs."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from apollo_sft.data.read.files import expand_paths
from apollo_sft.data.store.build import Builder, Say
from apollo_sft.data.store.fingerprint import store_key
from apollo_sft.data.store.store_files import LAST_USED, SampleStore
from apollo_sft.data.store.summary import StoreSummary
from apollo_sft.data.store.tokenise import StoreRequest
from apollo_sft.errors import DataError

__all__ = ["BUILDING", "SampleStore", "StoreRequest", "StoreSummary", "key_lock", "prepare_store", "store_root"]

BUILDING = ".building-"


def prepare_store(request: StoreRequest, say: Say) -> SampleStore:
    """Return the store of this request, built by the first of any number of processes and opened by the others.

    Raises: DataError for a file, row, template or tokenizer that cannot be used, for rows over `data.max_length`
    under `data.truncation=error`, for rows that cannot be used (more than `data.max_bad_ratio` where `data.bad_rows` is
    `skip`), and for a dataset without a target. ApolloError when a process that tokenises is ended.
    """
    begun = time.time_ns()
    files = expand_paths(request.paths, request.files_key)
    root = store_root(request.data.store_dir)
    try:
        root.mkdir(parents=True, exist_ok=True)
        key = store_key(files, request.max_rows, request.tokenizer, request.template, request.data, root / "hashes")
        folder = root / key
        store = _open_store(folder)
        if store is None:
            with _locked(key_lock(folder), say):
                store = _open_store(folder) or _build(request, files, folder, say, begun)
    except OSError as error:
        room = ""
        if error.errno == errno.ENOSPC:
            room = " with more room"
        raise DataError(
            f"data.store_dir: the tokenised data cannot be kept in {root}",
            found=error.strerror or str(error),
            expected="a folder that can be written" + room,
            fix="data.store_dir=FOLDER",
        ) from error

    # Another run may have built this store with a larger ratio, which is not part of its key.
    if request.data.bad_rows == "skip" and store.summary.rows_bad:
        from apollo_sft.data.store.bad_rows import refuse_too_many_bad

        refuse_too_many_bad(store.summary, request.files_key, request.data.max_bad_ratio)
    return store


def store_root(store_dir: str | None) -> Path:
    """Return `data.store_dir`, or a folder in the user's cache."""
    if store_dir is not None:
        return Path(store_dir).expanduser()
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(cache).expanduser() / "apollo-sft" / "store"


def _open_store(folder: Path) -> SampleStore | None:
    """Return the store in a folder; None when there is none, or when it is damaged: then it is built again."""
    try:
        return SampleStore(folder)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def key_lock(folder: Path) -> FileLock:
    """Return the lock of the process that makes or removes the store in `folder`. The system releases it when the
    process ends.
    """
    return FileLock(folder.with_name(f"{folder.name}.lock"))


@contextmanager
def _locked(lock: FileLock, say: Say) -> Iterator[None]:
    try:
        lock.acquire(timeout=1.0)
    except Timeout:
        say("another process tokenises the same data: waiting for it")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _build(request: StoreRequest, files: list[str], folder: Path, say: Say, begun: int) -> SampleStore:
    """Build under the lock. Unfinished stores of this key are removed: the processes that wrote them have ended.

    `begun`: when this process began to wait. Raises: the error of another one that has failed since.
    """
    failed = folder.with_name(f"{folder.name}.error")
    if failed.is_file() and failed.stat().st_mtime_ns > begun:
        raise DataError(failed.read_text(encoding="utf-8"))

    for left in (folder, *folder.parent.glob(f"{BUILDING}{folder.name}*")):
        shutil.rmtree(left, ignore_errors=True)
    failed.unlink(missing_ok=True)

    # A name of its own: the workers of a builder that was killed may live for a moment, and write.
    building = folder.with_name(f"{BUILDING}{folder.name}-{secrets.token_hex(4)}")
    building.mkdir()
    try:
        Builder(request, files, building, say).run(folder.name)
        (building / LAST_USED).touch()
        building.rename(folder)
        _sync_folder(folder.parent)
    except DataError as error:
        # Those who wait for the lock would meet the same error after the same work.
        failed.write_text(str(error), encoding="utf-8")
        raise
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return SampleStore(folder)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

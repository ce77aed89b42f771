"""Find and open data at a URL, and data sets of the hub, by fsspec."""

from __future__ import annotations

import hashlib
import re
from contextlib import suppress
from pathlib import PurePosixPath
from typing import Any, BinaryIO, cast

from apollo_sft.data.read.files import (
    NAMED_FILES,
    REMOTE_READ_BYTES,
    cause,
    known_kind,
    no_file,
    of_one_kind,
    reached,
    shown,
)
from apollo_sft.errors import DataError

EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs", "http": "http", "https": "http"}
"""The pip extra that brings the backend of a scheme."""
SPLIT = re.compile(r"(?:^|[/_.-])(train|validation|valid|val|dev|test)(?=[/_.-]|$)")
VALIDATION_SPLITS = ("validation", "valid", "val", "dev", "test")
CHECKSUMS = ("ETag", "etag", "e_tag", "md5Hash", "crc32c", "Content-MD5", "Digest", "content_md5", "blob_id", "sha256")
TIMES = ("LastModified", "last_modified", "Last-Modified", "mtime", "modified", "updated", "created")


def filesystem(url: str, key: str) -> tuple[Any, str]:
    """Return fsspec's file system of a URL or a path, and the path in it.

    Raises: DataError, naming `key`, for an unknown scheme, a backend that is not installed or cannot be reached.
    """
    import fsspec

    scheme = url.partition("://")[0]
    if "::" in url:
        raise DataError(f"{key}: a chain of file systems cannot be used", found=url, expected="one URL")

    try:
        fs, path = fsspec.url_to_fs(url)
    except ImportError as error:
        fix = cause(error)  # it names the package
        if scheme in EXTRAS:
            fix = f"pip install 'apollo-sft[{EXTRAS[scheme]}]'"
        raise DataError(f"{key}: {scheme}:// needs a package that is not installed", found=url, fix=fix) from error
    except ValueError as error:
        raise DataError(
            f"{key}: the URL cannot be used",
            found=f"{url}: {cause(error)}",
            expected="a path, or a scheme that fsspec knows: s3, gs, hf, hdfs, https, …",
        ) from error
    except Exception as error:  # the client of a store: it may raise anything
        fix = None
        if scheme == "hdfs":
            fix = "it needs Java and Hadoop's client: JAVA_HOME, HADOOP_HOME and CLASSPATH"
        raise DataError(f"{key}: {scheme}:// cannot be reached", found=cause(error), fix=fix) from error
    return fs, path


def open_url(url: str) -> BinaryIO:
    """Open a file for reading at any place. Raises: what the store raises."""
    fs, path = filesystem(url, "data")
    return cast(BinaryIO, fs.open(path, "rb", block_size=REMOTE_READ_BYTES, cache_type="readahead"))


def size_of_url(url: str) -> int | None:
    """Return the bytes of a file; None where the remote store does not know them."""
    fs, path = filesystem(url, "data")
    size = fs.info(path).get("size")
    if size is None:
        return None
    return int(size)


def stamp_of_url(url: str) -> str | None:
    """Return a text that changes when the file does: a checksum or times. None where the remote store has none."""
    fs, path = filesystem(url, "data")
    info = fs.info(path)
    found = [f"{name}={info[name]}" for name in CHECKSUMS if info.get(name)]
    if not found:
        found = [f"{name}={info[name]}" for name in TIMES if info.get(name)]
    if not found:
        return None
    return "|".join([str(info.get("size")), *found])


def remote_hash(file: str) -> str:
    """Return the SHA-256 of the stamp that the remote store has of a file, or of the content where it has none.

    Raises: DataError when it cannot be reached or read.
    """
    what = f"{shown(file)}: the file cannot be read"
    stamp = reached(lambda: stamp_of_url(file), what)
    if stamp is not None:
        return hashlib.sha256(stamp.encode()).hexdigest()

    digest = hashlib.sha256()
    with reached(lambda: open_url(file), what) as content:
        block = reached(lambda: content.read(REMOTE_READ_BYTES), what)
        while block:
            digest.update(block)
            block = reached(lambda: content.read(REMOTE_READ_BYTES), what)
    return digest.hexdigest()


def expand_url(url: str, key: str) -> list[str]:
    """Return the files that a URL names, as for a local path. A store of HTTP has no folders.

    Raises: DataError, naming `key`.
    """
    fs, path = filesystem(url, key)
    unreached = f"{key}: {url} cannot be reached"
    start = _start(url.rstrip("/"), path, fs)
    if "*" in path:
        entries = reached(lambda: fs.glob(path, detail=True), unreached)
        found = [start + name for name, info in entries.items() if info["type"] == "file"]
        if not found:
            raise _no_file(fs, path, url, key)
        return sorted(found)

    try:
        is_folder = fs.info(path)["type"] == "directory"
    except FileNotFoundError:
        raise _no_file(fs, path, url, key) from None
    except Exception as error:  # the client of a store
        raise DataError(unreached, found=cause(error)) from error
    if not is_folder:
        return [url]
    names = reached(lambda: fs.find(path), unreached)
    return of_one_kind(url, [start + name for name in names], key)


def _no_file(fs: Any, path: str, url: str, key: str) -> DataError:
    """Return the error about a URL without a file, with a similar name where the remote store lists its folder."""
    start = _start(url.rstrip("/"), path, fs)
    names = []
    with suppress(Exception):  # the list is for a suggestion only
        names = fs.ls(path.rpartition("/")[0], detail=False)
    return no_file(url, key, [start + name.rstrip("/") for name in names])


def _start(url: str, path: str, fs: Any) -> str:
    """Return scheme and host: the part of a URL before the path in its file system."""
    path = path.rstrip("/")
    if url.endswith(path):
        return url[: len(url) - len(path)]
    return str(fs.unstrip_protocol("")).rstrip("/")


def expand_data_set(name: str, key: str) -> list[str]:
    """Return the files of a split of a data set of the hub: `train`, or for validation the first of VALIDATION_SPLITS.

    Raises: DataError, naming `key`.
    """
    url = f"hf://datasets/{name}"
    fs, path = filesystem(url, key)
    try:
        names = fs.find(path)
    except Exception as error:  # no network, no such data set, no right to read it
        raise DataError(
            f"{key}: no such file, and no data set of the hub that can be reached",
            found=f"{name}: {cause(error)}",
            expected="a file, a folder, a glob, a URL, or a data set of the hub",
        ) from error

    inside = {entry: entry.removeprefix(path).lstrip("/") for entry in names if known_kind(entry)}
    of_split: dict[str, list[str]] = {}
    for entry, relative in inside.items():
        found = SPLIT.search(relative)
        if found:
            of_split.setdefault(found.group(1), []).append(entry)

    wanted = VALIDATION_SPLITS if key == "data.val_files" else ("train",)
    split = next((split for split in wanted if split in of_split), None)
    if split is None:
        raise DataError(
            f"{key}: the data set {name} has no files of the split {wanted[0]}",
            found=", ".join(sorted(inside.values())[:NAMED_FILES]) or "no data file",
            fix=f"name the files: hf://datasets/{name}/FOLDER/*.parquet",
        )

    # Each folder is a configuration of the data set: mixing them would train what the user did not name.
    chosen = of_split[split]
    folders = sorted({str(PurePosixPath(inside[entry]).parent) for entry in chosen})
    if len(folders) > 1:
        raise DataError(
            f"{key}: several folders of the data set {name} hold the split {split}",
            found=", ".join(folders[:NAMED_FILES]),
            fix=f"name the one that is meant: hf://datasets/{name}/{folders[0]}/{split}*",
        )
    return of_one_kind(name, [_start(url, path, fs) + entry for entry in chosen], key)

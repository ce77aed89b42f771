"""Data at a URL, and data sets of the hub, by fsspec: their files, and the bytes of these."""

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
    """fsspec's file system of a URL or a path, and the path in it.

    Raises: DataError, naming `key`, for an unknown scheme, a backend that is not installed or cannot be reached.
    """
    import fsspec

    scheme = url.partition("://")[0]
    if "::" in url:
        raise DataError(f"{key}: a chain of file systems cannot be used", found=url, expected="one URL")
    try:
        fs, path = fsspec.url_to_fs(url)
    except ImportError as error:
        extra = EXTRAS.get(scheme)
        fix = f"pip install 'apollo-sft[{extra}]'" if extra else cause(error)
        raise DataError(f"{key}: {scheme}:// needs a package that is not installed", found=url, fix=fix) from error
    except ValueError as error:
        raise DataError(
            f"{key}: the URL cannot be used",
            found=f"{url}: {cause(error)}",
            expected="a path, or a scheme that fsspec knows: s3, gs, hf, hdfs, https, …",
        ) from error
    except Exception as error:  # the client of a store: it may raise anything
        java = "it needs Java and Hadoop's client: JAVA_HOME, HADOOP_HOME and CLASSPATH"
        raise DataError(
            f"{key}: {scheme}:// cannot be reached", found=cause(error), fix=java if scheme == "hdfs" else None
        ) from error
    return fs, path


def open_url(url: str) -> BinaryIO:
    """Open a file for reading at any place. Raises: what the store raises."""
    fs, path = filesystem(url, "data")
    return cast(BinaryIO, fs.open(path, "rb", block_size=REMOTE_READ_BYTES, cache_type="readahead"))


def size_of_url(url: str) -> int | None:
    """Return the bytes of a file; None where the store does not say."""
    fs, path = filesystem(url, "data")
    size = fs.info(path).get("size")
    return None if size is None else int(size)


def stamp_of_url(url: str) -> str | None:
    """Return what changes when the file does: a checksum of the store, or its times. None: it has none."""
    fs, path = filesystem(url, "data")
    info = fs.info(path)
    found = [f"{name}={info[name]}" for name in CHECKSUMS if info.get(name)]
    found = found or [f"{name}={info[name]}" for name in TIMES if info.get(name)]
    return "|".join([str(info.get("size")), *found]) if found else None


def remote_hash(file: str) -> str:
    """SHA-256 of what the store says of the content, or of the content where it says nothing.

    Raises: DataError when it cannot be reached or read.
    """
    what = f"{shown(file)}: the file cannot be read"
    said = reached(lambda: stamp_of_url(file), what)
    if said is not None:
        return hashlib.sha256(said.encode()).hexdigest()
    digest = hashlib.sha256()
    with reached(lambda: open_url(file), what) as content:
        while block := reached(lambda: content.read(REMOTE_READ_BYTES), what):
            digest.update(block)
    return digest.hexdigest()


def expand_url(url: str, key: str) -> list[str]:
    """As for a local path. A store of HTTP has no folders."""
    fs, path = filesystem(url, key)
    unreached = f"{key}: {url} cannot be reached"
    start = _start(url.rstrip("/"), path, fs)
    if "*" in path:
        entries = reached(lambda: fs.glob(path, detail=True), unreached)
        found = [start + name for name, info in entries.items() if info["type"] == "file"]
    else:
        try:
            is_folder = fs.info(path)["type"] == "directory"
        except FileNotFoundError:
            found = []
        except Exception as error:  # the client of a store
            raise DataError(unreached, found=cause(error)) from error
        else:
            names = reached(lambda: fs.find(path), unreached) if is_folder else []
            return of_one_kind(url, [start + name for name in names], key) if is_folder else [url]
    if not found:
        names = []
        with suppress(Exception):  # only to say what was meant
            names = fs.ls(path.rpartition("/")[0], detail=False)
        raise no_file(url, key, [start + name.rstrip("/") for name in names])
    return sorted(found)


def _start(url: str, path: str, fs: Any) -> str:
    """What stands before the path of a file system in a URL of it: scheme and host."""
    path = path.rstrip("/")
    return url[: len(url) - len(path)] if url.endswith(path) else str(fs.unstrip_protocol("")).rstrip("/")


def expand_data_set(name: str, key: str) -> list[str]:
    """The files of a split of a data set of the hub: `train`, or for validation the first of VALIDATION_SPLITS."""
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
        if split := SPLIT.search(relative):
            of_split.setdefault(split.group(1), []).append(entry)
    wanted = VALIDATION_SPLITS if key == "data.val_files" else ("train",)
    split_name = next((split for split in wanted if split in of_split), None)
    if split_name is None:
        raise DataError(
            f"{key}: the data set {name} has no files of the split {wanted[0]}",
            found=", ".join(sorted(inside.values())[:NAMED_FILES]) or "no data file",
            fix=f"name the files: hf://datasets/{name}/FOLDER/*.parquet",
        )
    chosen = of_split[split_name]
    folders = sorted({str(PurePosixPath(inside[entry]).parent) for entry in chosen})
    if len(folders) > 1:
        raise DataError(
            f"{key}: several folders of the data set {name} hold the split {split_name}",
            found=", ".join(folders[:NAMED_FILES]),
            fix=f"name the one that is meant: hf://datasets/{name}/{folders[0]}/{split_name}*",
        )
    return of_one_kind(name, [_start(url, path, fs) + entry for entry in chosen], key)

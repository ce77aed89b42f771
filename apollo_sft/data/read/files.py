"""Find and open data files: paths, folders, globs, URLs and data sets of the hub give files, in order."""

from __future__ import annotations

import difflib
import glob
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, Literal, TypeVar

from apollo_sft.config.checks import is_hub_data_set, without_file_scheme
from apollo_sft.errors import DataError
from apollo_sft.redact import redact

T = TypeVar("T")
Row = dict[str, Any]
Kind = Literal["parquet", "JSON lines", "Arrow"]
Found = Iterator[tuple[int, Row | DataError]]
"""Rows of a file by their number, or the error of a row in its place."""

SUFFIXES: dict[Kind, tuple[str, ...]] = {
    "parquet": (".parquet", ".pq"),
    "JSON lines": (".jsonl", ".ndjson", ".json", ".jsonl.gz", ".ndjson.gz", ".json.gz", ".jsonl.zst", ".ndjson.zst"),
    "Arrow": (".arrow", ".feather", ".ipc"),
}
COMPRESSED = {".gz": "gzip", ".zst": "zstd"}
METADATA_FILES = frozenset(
    {"dataset_info.json", "dataset_infos.json", "state.json", "dataset_dict.json", "manifest.json", "rejected.jsonl"}
)
"""Files beside data that hold none. `cache-….arrow` are results that the library datasets keeps."""

READ_BYTES = 1 << 20
REMOTE_READ_BYTES = 1 << 23
NAMED_FILES = 5
NAMED_COLUMNS_CHARACTERS = 400


@dataclass(frozen=True, slots=True)
class Columns:
    """The columns that are read of each file."""

    required: tuple[str, ...]

    optional: tuple[str, ...]
    """Read where they exist."""

    keys: dict[str, str]
    """The config key that names each required column."""


def expand_paths(paths: Sequence[str], key: str) -> list[str]:
    """Return the files that `paths` name, in order: a file as it is, a folder's or a glob's files by name.

    Raises: DataError, naming `key`, when a path gives no file, a folder holds several kinds, or a store on the network
    cannot be reached.
    """
    files: list[str] = []
    for path in paths:
        files += _expand(without_file_scheme(path), key)
    return files


def kind_of(file: str) -> Kind:
    """Return the kind of a file, by its extension; a file with an unknown one is taken for parquet."""
    return known_kind(file) or "parquet"


def is_remote(file: str) -> bool:
    """Return whether a file is a URL."""
    return "://" in file


def shown(file: str) -> str:
    """Return the name of a file in messages, ledgers and stores: a URL without its secrets."""
    if not is_remote(file):
        return file
    return redact(file)


def compression_of(file: str) -> str | None:
    """Return the compression of a file, by its extension; None where it has none."""
    return COMPRESSED.get(PurePosixPath(_path_in(file)).suffix)


def open_file(file: str) -> BinaryIO:
    """Open a file whose bytes can be read at any place. Raises: what the system or the remote store raises."""
    if not is_remote(file):
        return Path(file).open("rb", buffering=READ_BYTES)

    from apollo_sft.data.read.remote import open_url

    return open_url(file)


def size_of(file: str) -> int | None:
    """Return the bytes of a file; None where a remote store does not know them."""
    if not is_remote(file):
        return Path(file).stat().st_size

    from apollo_sft.data.read.remote import size_of_url

    return size_of_url(file)


def stamp(file: str) -> str | None:
    """Return a text that changes when the file does: stamps of the system, or a checksum or times of a remote store.

    None where a remote store has none.
    """
    if not is_remote(file):
        stat = Path(file).stat()
        return f"{stat.st_dev}|{stat.st_ino}|{stat.st_size}|{stat.st_mtime_ns}|{stat.st_ctime_ns}"

    from apollo_sft.data.read.remote import stamp_of_url

    return stamp_of_url(file)


def reached(call: Callable[[], T], what: str) -> T:
    """Return what `call` returns. Raises: DataError, `what` and the cause, for any error of a remote store's client."""
    try:
        return call()
    except DataError:
        raise
    except Exception as error:
        raise DataError(what, found=cause(error)) from error


def cause(error: BaseException) -> str:
    """Return an error in one line."""
    lines = str(error).strip().splitlines()
    if not lines:
        return type(error).__name__
    return lines[0]


def lacking(where: str, name: str, present: Sequence[str], columns: Columns) -> DataError:
    """Return the error about a file, or a row, without a required column."""
    key = columns.keys[name]
    close = difflib.get_close_matches(name, present, n=1)
    fix = f"set {key} to the column that is meant"
    if close:
        fix = f"{key}={close[0]}"
    return DataError(
        f"{where} has no column {name!r} ({key})",
        found=f"columns {', '.join(present) or '(none)'}"[:NAMED_COLUMNS_CHARACTERS],
        fix=fix,
    )


def _path_in(file: str) -> str:
    """Return a file without the query of a URL, which may sign it."""
    if not is_remote(file):
        return file
    return file.partition("?")[0]


def known_kind(file: str) -> Kind | None:
    """Return the kind of a file, by its extension; None for an unknown one."""
    name = PurePosixPath(_path_in(file)).name.lower()
    for kind, suffixes in SUFFIXES.items():
        if name.endswith(suffixes):
            return kind
    return None


def _expand(path: str, key: str) -> list[str]:
    if is_remote(path):
        from apollo_sft.data.read.remote import expand_url

        return expand_url(path, key)

    if Path(path).is_file():
        return [path]
    if Path(path).is_dir():
        found = glob.glob(str(Path(glob.escape(path)) / "**" / "*"), recursive=True)  # noqa: PTH207
        return of_one_kind(path, [name for name in found if Path(name).is_file()], key)

    # A folder of that name comes first, so that a local copy of a data set is read where there is one.
    if is_hub_data_set(path):
        from apollo_sft.data.read.remote import expand_data_set

        return expand_data_set(path, key)

    found = sorted(name for name in glob.glob(path, recursive=True) if Path(name).is_file())  # noqa: PTH207
    if not found:
        parent = Path(path).parent
        beside = [str(entry) for entry in sorted(parent.iterdir())] if parent.is_dir() else []
        raise no_file(path, key, beside)
    return found


def of_one_kind(folder: str, names: Sequence[str], key: str) -> list[str]:
    """Return the data files among `names`, sorted. JSON beside data of another kind, and hidden files, are no data."""
    root = folder.rstrip("/")
    plain = [name for name in names if "/." not in f"/{name.removeprefix(root)}"]
    if any(name.endswith("/dataset_dict.json") for name in plain):
        raise DataError(f"{key}: the folder holds several splits", found=folder, fix=f"name one: {root}/train")

    data = [name for name in plain if PurePosixPath(name).name not in METADATA_FILES and known_kind(name)]
    data = [name for name in data if not re.fullmatch(r"cache-[^/]*\.arrow", PurePosixPath(name).name)]
    # A file of JSON beside parquet or Arrow describes the data; alone it is the data.
    data = [name for name in data if not name.endswith(".json")] or data

    kinds = Counter(map(kind_of, data))
    if len(kinds) > 1:
        example = PurePosixPath(_path_in(data[0])).suffix
        counts = ", ".join(f"{number} {kind}" for kind, number in sorted(kinds.items()))
        raise DataError(
            f"{key}: the folder holds several kinds of files",
            found=f"{folder}: {counts}",
            fix=f"name those that are meant: '{root}/*{example}'",
        )
    if not data:
        raise DataError(
            f"{key}: the folder holds no data file", found=folder, expected="*.parquet, *.jsonl, *.json or *.arrow"
        )
    return sorted(data)


def no_file(path: str, key: str, beside: Sequence[str]) -> DataError:
    """Return the error about a path without a file. `beside`: the files in its folder."""
    names = {PurePosixPath(name).name: name for name in beside}
    close = difflib.get_close_matches(PurePosixPath(path).name, list(names), n=1)
    fix = None
    if close:
        fix = f"did you mean {names[close[0]]}?"
    elif key == "data.val_files":
        fix = "data.val_files=null trains without validation"
    return DataError(
        f"{key}: no such file",
        found=path,
        expected="a file (parquet, JSON lines or Arrow), a folder or a glob",
        fix=fix,
    )

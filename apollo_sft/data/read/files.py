"""Where data lie: paths, folders, globs, URLs and data sets of the hub -> files, in order; and their bytes."""

from __future__ import annotations

import difflib
import glob
import hashlib
import re
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, Literal, TypeVar, cast

from apollo_sft.config.checks import is_hub_data_set, without_file_scheme
from apollo_sft.errors import DataError
from apollo_sft.redact import redact

T = TypeVar("T")
Row = dict[str, Any]
Kind = Literal["parquet", "JSON lines", "Arrow"]
SUFFIXES: dict[Kind, tuple[str, ...]] = {
    "parquet": (".parquet", ".pq"),
    "JSON lines": (".jsonl", ".ndjson", ".json", ".jsonl.gz", ".ndjson.gz", ".json.gz", ".jsonl.zst", ".ndjson.zst"),
    "Arrow": (".arrow", ".feather", ".ipc"),
}
COMPRESSED = {".gz": "gzip", ".zst": "zstd"}
ABOUT_DATA = frozenset(
    {"dataset_info.json", "dataset_infos.json", "state.json", "dataset_dict.json", "manifest.json", "rejected.jsonl"}
)
"""Files beside data that hold none. `cache-….arrow` are what the library datasets computed of others."""
READ_BYTES = 1 << 20
REMOTE_READ_BYTES = 1 << 23
EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs", "http": "http", "https": "http"}
"""The pip extra that brings the backend of a scheme."""
SPLIT = re.compile(r"(?:^|[/_.-])(train|validation|valid|val|dev|test)(?=[/_.-]|$)")
VALIDATION_SPLITS = ("validation", "valid", "val", "dev", "test")
CHECKSUMS = ("ETag", "etag", "e_tag", "md5Hash", "crc32c", "Content-MD5", "Digest", "content_md5", "blob_id", "sha256")
TIMES = ("LastModified", "last_modified", "Last-Modified", "mtime", "modified", "updated", "created")
NAMED_FILES = 5
NAMED_COLUMNS_CHARACTERS = 400


@dataclass(frozen=True, slots=True)
class Columns:
    """What is read of each file. `optional` columns are read where they exist. `keys` names the key of a column."""

    required: tuple[str, ...]
    optional: tuple[str, ...]
    keys: dict[str, str]


def expand_paths(paths: Sequence[str], key: str) -> list[str]:
    """The files that `paths` name, in order: a file as it is, a folder's or a glob's files by name.

    Raises: DataError, naming `key`, when a path gives no file, a folder holds several kinds, or a store on the network
    cannot be reached.
    """
    return [file for path in paths for file in _expand(without_file_scheme(path), key)]


def kind_of(file: str) -> Kind:
    """By the extension; a file with an unknown one is taken for parquet."""
    return _known_kind(file) or "parquet"


def is_remote(file: str) -> bool:
    return "://" in file


def shown(file: str) -> str:
    """The file as messages, ledgers and stores name it: a URL without its secrets."""
    return redact(file) if is_remote(file) else file


def compression_of(file: str) -> str | None:
    return COMPRESSED.get(PurePosixPath(_path_in(file)).suffix)


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


def open_file(file: str) -> BinaryIO:
    """Bytes that can be read at any place. Raises: what the system or the store raises."""
    if not is_remote(file):
        return Path(file).open("rb", buffering=READ_BYTES)
    fs, path = filesystem(file, "data")
    return cast(BinaryIO, fs.open(path, "rb", block_size=REMOTE_READ_BYTES, cache_type="readahead"))


def size_of(file: str) -> int | None:
    """Bytes; None where a store does not say."""
    if not is_remote(file):
        return Path(file).stat().st_size
    fs, path = filesystem(file, "data")
    size = fs.info(path).get("size")
    return None if size is None else int(size)


def stamp(file: str) -> str | None:
    """What changes when the file does: stamps of the system, or a checksum or times of a store. None: it has none."""
    if not is_remote(file):
        stat = Path(file).stat()
        return f"{stat.st_dev}|{stat.st_ino}|{stat.st_size}|{stat.st_mtime_ns}|{stat.st_ctime_ns}"
    fs, path = filesystem(file, "data")
    info = fs.info(path)
    found = [f"{name}={info[name]}" for name in CHECKSUMS if info.get(name)]
    found = found or [f"{name}={info[name]}" for name in TIMES if info.get(name)]
    return "|".join([str(info.get("size")), *found]) if found else None


def remote_hash(file: str) -> str:
    """SHA-256 of what the store says of the content, or of the content where it says nothing.

    Raises: DataError when it cannot be reached or read.
    """
    what = f"{shown(file)}: the file cannot be read"
    said = reached(lambda: stamp(file), what)
    if said is not None:
        return hashlib.sha256(said.encode()).hexdigest()
    digest = hashlib.sha256()
    with reached(lambda: open_file(file), what) as content:
        while block := reached(lambda: content.read(REMOTE_READ_BYTES), what):
            digest.update(block)
    return digest.hexdigest()


def reached(call: Callable[[], T], what: str) -> T:
    """What `call` gives. Raises: DataError, `what` and the cause, for whatever the client of a store raises."""
    try:
        return call()
    except DataError:
        raise
    except Exception as error:
        raise DataError(what, found=cause(error)) from error


def cause(error: BaseException) -> str:
    """In one line."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def lacking(where: str, name: str, present: Sequence[str], columns: Columns) -> DataError:
    """A file, or a row, has no column of that name."""
    close, key = difflib.get_close_matches(name, present, n=1), columns.keys[name]
    return DataError(
        f"{where} has no column {name!r} ({key})",
        found=f"columns {', '.join(present) or '(none)'}"[:NAMED_COLUMNS_CHARACTERS],
        fix=f"{key}={close[0]}" if close else f"set {key} to the column that is meant",
    )


def _path_in(file: str) -> str:
    """Without what may sign a URL."""
    return file.partition("?")[0] if is_remote(file) else file


def _known_kind(file: str) -> Kind | None:
    name = PurePosixPath(_path_in(file)).name.lower()
    return next((kind for kind, suffixes in SUFFIXES.items() if name.endswith(suffixes)), None)


def _expand(path: str, key: str) -> list[str]:
    if is_remote(path):
        return _expand_url(path, key)
    if Path(path).is_file():
        return [path]
    if Path(path).is_dir():
        found = glob.glob(str(Path(glob.escape(path)) / "**" / "*"), recursive=True)  # noqa: PTH207
        return _of_one_kind(path, [name for name in found if Path(name).is_file()], key)
    if is_hub_data_set(path):
        return _expand_data_set(path, key)
    found = sorted(name for name in glob.glob(path, recursive=True) if Path(name).is_file())  # noqa: PTH207
    if not found:
        parent = Path(path).parent
        names = sorted(entry.name for entry in parent.iterdir()) if parent.is_dir() else []
        raise _no_file(path, key, [str(parent / name) for name in names])
    return found


def _expand_url(url: str, key: str) -> list[str]:
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
            return _of_one_kind(url, [start + name for name in names], key) if is_folder else [url]
    if not found:
        names = []
        with suppress(Exception):  # only to say what was meant
            names = fs.ls(path.rpartition("/")[0], detail=False)
        raise _no_file(url, key, [start + name.rstrip("/") for name in names])
    return sorted(found)


def _start(url: str, path: str, fs: Any) -> str:
    """What stands before the path of a file system in a URL of it: scheme and host."""
    path = path.rstrip("/")
    return url[: len(url) - len(path)] if url.endswith(path) else str(fs.unstrip_protocol("")).rstrip("/")


def _expand_data_set(name: str, key: str) -> list[str]:
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
    inside = {entry: entry.removeprefix(path).lstrip("/") for entry in names if _known_kind(entry)}
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
    return _of_one_kind(name, [_start(url, path, fs) + entry for entry in chosen], key)


def _of_one_kind(folder: str, names: Sequence[str], key: str) -> list[str]:
    """The data files among `names`, sorted. JSON beside data of another kind, and hidden files, are no data."""
    root = folder.rstrip("/")
    plain = [name for name in names if not any(part.startswith(".") for part in name.removeprefix(root).split("/"))]
    if any(name.endswith("/dataset_dict.json") for name in plain):
        raise DataError(f"{key}: the folder holds several splits", found=folder, fix=f"name one: {root}/train")
    data = [name for name in plain if PurePosixPath(name).name not in ABOUT_DATA and _known_kind(name)]
    data = [name for name in data if not re.fullmatch(r"cache-[^/]*\.arrow", PurePosixPath(name).name)]
    data = [name for name in data if not name.endswith(".json")] or data
    kinds = Counter(map(kind_of, data))
    if len(kinds) > 1:
        example = PurePosixPath(_path_in(data[0])).suffix
        raise DataError(
            f"{key}: the folder holds several kinds of files",
            found=f"{folder}: " + ", ".join(f"{number} {kind}" for kind, number in sorted(kinds.items())),
            fix=f"name those that are meant: '{root}/*{example}'",
        )
    if not data:
        raise DataError(
            f"{key}: the folder holds no data file", found=folder, expected="*.parquet, *.jsonl, *.json or *.arrow"
        )
    return sorted(data)


def _no_file(path: str, key: str, beside: Sequence[str]) -> DataError:
    names = {PurePosixPath(name).name: name for name in beside}
    close = difflib.get_close_matches(PurePosixPath(path).name, list(names), n=1)
    fix = f"did you mean {names[close[0]]}?" if close else None
    if fix is None and key == "data.val_files":
        fix = "data.val_files=null trains without validation"
    return DataError(
        f"{key}: no such file",
        found=path,
        expected="a file (parquet, JSON lines or Arrow), a folder or a glob",
        fix=fix,
    )

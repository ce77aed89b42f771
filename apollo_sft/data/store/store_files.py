"""Write and read the files of a store: flat arrays written in pieces, and the summary beside them."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import weakref
from array import array
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from apollo_sft.data.store.summary import StoreSummary
from apollo_sft.types import IGNORE_INDEX, RowRef, Sample

__all__ = [
    "LAST_USED",
    "META",
    "REJECTED",
    "Rejected",
    "SampleStore",
    "StoreSummary",
    "StoreWriter",
    "count_targets",
    "try_to_own",
]

ARRAYS: dict[str, np.dtype[Any]] = {
    "input_ids": np.dtype("<i4"),
    "labels": np.dtype("<i4"),
    "offsets": np.dtype("<i8"),
    "lengths": np.dtype("<i4"),
    "num_targets": np.dtype("<i4"),
    "sources": np.dtype("<i4"),
    "rows": np.dtype("<i8"),
    "turns": np.dtype("<i4"),
    "turn_offsets": np.dtype("<i8"),
}
ENDS = ("offsets", "turn_offsets")
"""Arrays of the ends of samples in another array; a 0 comes first."""

BUFFERED_NUMBERS = 4096
"""Numbers of an array that are kept in memory before they are written."""

BLOCK = 1 << 20
"""Numbers of an array that are copied at a time."""

META = "meta.json"
REJECTED = "rejected.jsonl"
LAST_USED = "last_used"


@dataclass(frozen=True, slots=True)
class Rejected:
    """A row, or one of its samples, that is not trained or not complete: one line of the ledger."""

    file: str
    row: int

    turns: tuple[int, ...]
    """The turns of the sample."""

    trained: bool
    """The rest of the sample is trained."""

    reason: str

    tokens_lost: int
    """Tokens that are not trained; 0 for a row that could not be rendered."""

    targets_lost: int

    unwritten: bool = False
    """The turns are trained, or read, without a part that the template does not write."""

    keys: tuple[str, ...] = ()
    """The names of these parts."""


def count_targets(sample: Sample) -> int:
    """Return `Sample.num_targets`, quicker."""
    return int(np.count_nonzero(sample.labels != IGNORE_INDEX))


class ArrayWriter:
    """One flat .npy file that grows. The length in the header is written last."""

    def __init__(self, path: Path, dtype: np.dtype[Any]) -> None:
        self.dtype = dtype
        self.length = 0
        self.file: BinaryIO = path.open("wb")
        self.header_bytes = self._write_header(0)

    def append(self, values: np.ndarray) -> None:
        """Append values, converted to the type of the file."""
        self.file.write(np.ascontiguousarray(values, dtype=self.dtype).tobytes())
        self.length += len(values)

    def close(self, synced: bool) -> None:
        """Write the length and close the file; all of it is on disk when this returns if `synced`."""
        self.file.seek(0)
        written = self._write_header(self.length)
        assert written == self.header_bytes, "numpy pads the header of a flat array to one size"

        self.file.flush()
        if synced:
            os.fsync(self.file.fileno())
        self.file.close()

    def _write_header(self, length: int) -> int:
        header = {"descr": np.lib.format.dtype_to_descr(self.dtype), "fortran_order": False, "shape": (length,)}
        np.lib.format.write_array_header_1_0(self.file, header)
        return self.file.tell()


class StoreWriter:
    """Writes samples one by one. Memory holds `BUFFERED_NUMBERS` of an array, however many samples there are."""

    def __init__(self, folder: Path, files: list[str]) -> None:
        self.folder = folder
        self.files = files
        self.file_index = {file: index for index, file in enumerate(files)}
        self.arrays = {name: ArrayWriter(folder / f"{name}.npy", dtype) for name, dtype in ARRAYS.items()}
        self.buffers = {name: array(dtype.char) for name, dtype in ARRAYS.items()}
        self.num_tokens = 0
        self.num_turns = 0
        for name in ENDS:
            self.buffers[name].append(0)
        self.rejected = (folder / REJECTED).open("w", encoding="utf-8")

    def reject(self, rejected: Rejected) -> None:
        """Write one line of the ledger."""
        self.rejected.write(json.dumps(asdict(rejected), ensure_ascii=False) + "\n")

    def add(self, sample: Sample) -> None:
        """Write a sample."""
        if sample.ref.file not in self.file_index:  # a class of the user's names its rows as it likes
            self.file_index[sample.ref.file] = len(self.files)
            self.files.append(sample.ref.file)

        self.arrays["input_ids"].append(sample.input_ids)
        self.arrays["labels"].append(sample.labels)
        self.num_tokens += len(sample.input_ids)
        self.num_turns += len(sample.turns)

        buffers = self.buffers
        buffers["offsets"].append(self.num_tokens)
        buffers["lengths"].append(len(sample.input_ids))
        buffers["num_targets"].append(count_targets(sample))
        buffers["sources"].append(self.file_index[sample.ref.file])
        buffers["rows"].append(sample.ref.row)
        buffers["turns"].extend(sample.turns)
        buffers["turn_offsets"].append(self.num_turns)
        if len(buffers["lengths"]) >= BUFFERED_NUMBERS:
            self._flush()

    def take(self, part: Path) -> None:
        """Append what another writer has written and closed in the folder `part`. It must know the same files."""
        self._flush()
        before = {"offsets": self.num_tokens, "turn_offsets": self.num_turns}
        for name, writer in self.arrays.items():
            # The ends in a part count from its own start, with a 0 first that only the first part needs.
            shift = before.get(name, 0)
            for block in _blocks(part / f"{name}.npy", skip=1 if name in ENDS else 0):
                writer.append(block + shift if shift else block)

        self.num_tokens = self.arrays["input_ids"].length
        self.num_turns = self.arrays["turns"].length
        with (part / REJECTED).open(encoding="utf-8") as file:
            shutil.copyfileobj(file, self.rejected)

    def close(self, synced: bool) -> None:
        """Write what is buffered and close the arrays; on disk if `synced`."""
        self._flush()
        for writer in self.arrays.values():
            writer.close(synced)
        self.rejected.flush()
        if synced:
            os.fsync(self.rejected.fileno())
        self.rejected.close()

    def finish(self, key: str, summary: StoreSummary) -> None:
        """Write what is buffered, and `meta.json` last; all of it is on disk when this returns."""
        self.close(synced=True)
        text = json.dumps({"key": key, "summary": summary.to_json()}, indent=1)
        with (self.folder / META).open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())

    def abandon(self) -> None:
        """Close the files of a store that is not finished, or is."""
        for writer in self.arrays.values():
            writer.file.close()
        self.rejected.close()

    def _flush(self) -> None:
        for name, values in self.buffers.items():
            if values:
                self.arrays[name].append(np.frombuffer(values, dtype=ARRAYS[name]))
                self.buffers[name] = array(values.typecode)


def _blocks(path: Path, skip: int) -> Iterator[np.ndarray]:
    """Yield a flat .npy file in pieces, without its first `skip` numbers."""
    with path.open("rb") as file:
        np.lib.format.read_magic(file)
        (length,), _, dtype = np.lib.format.read_array_header_1_0(file)
        file.seek(skip * dtype.itemsize, os.SEEK_CUR)
        for first in range(skip, length, BLOCK):
            yield np.frombuffer(file.read(min(BLOCK, length - first) * dtype.itemsize), dtype=dtype)


class SampleStore:
    """The samples of a dataset, read-only and memory-mapped: opening it costs nothing that grows with tokens.

    `lengths`, `num_targets`: int32 of shape (samples,). `sources`, `rows`: index of the file, and the row in it.
    As long as the object exists, a folder made by `prepare_store` is marked as in use.
    """

    def __init__(self, folder: Path) -> None:
        _mark_as_used(self, folder / LAST_USED)
        meta = json.loads((folder / META).read_text(encoding="utf-8"))
        self.folder = folder
        self.key: str = meta["key"]
        self.summary = StoreSummary.from_json(meta["summary"])

        self._ids = _open(folder, "input_ids")
        self._labels = _open(folder, "labels")
        self._offsets = _open(folder, "offsets")
        self.sources: np.ndarray = _open(folder, "sources")
        self.rows: np.ndarray = _open(folder, "rows")
        self._turns = _open(folder, "turns")
        self._turn_offsets = _open(folder, "turn_offsets")
        self.lengths: np.ndarray = _open(folder, "lengths")
        self.num_targets: np.ndarray = _open(folder, "num_targets")

        if len(self._ids) != self.summary.num_tokens or len(self.lengths) != self.summary.num_samples:
            raise ValueError(f"{folder}: arrays and summary disagree")

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, i: int) -> Sample:
        if not 0 <= i < len(self):
            raise IndexError(i)
        turns = self._turns[int(self._turn_offsets[i]) : int(self._turn_offsets[i + 1])]
        return Sample(*self.tokens(i), self.ref(i), tuple(turns.tolist()))

    def tokens(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """Return token ids and labels of sample `i`."""
        first = int(self._offsets[i])
        end = int(self._offsets[i + 1])
        return self._ids[first:end], self._labels[first:end]

    def rejected(self) -> Iterator[Rejected]:
        """Yield every row that is not trained or not complete, in the order of the rows."""
        with (self.folder / REJECTED).open(encoding="utf-8") as file:
            for line in file:
                entry = json.loads(line)
                yield Rejected(**entry | {"turns": tuple(entry["turns"])})

    def ref(self, i: int) -> RowRef:
        """Return the row of sample `i`."""
        return RowRef(self.summary.files[int(self.sources[i])], int(self.rows[i]))


def _open(folder: Path, name: str) -> np.ndarray:
    """Map one array. Raises: ValueError or OSError for a file that is missing, cut short or no array."""
    path = folder / f"{name}.npy"
    return np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))


def _mark_as_used(store: SampleStore, mark: Path) -> None:
    """Hold a shared lock as long as `store` exists, and set the time of last use. A folder that cannot be written gets
    no such mark.

    Waits while another process checks whether the store is in use, or removes it.
    """
    try:
        handle = os.open(mark, os.O_RDWR)
    except OSError:
        return

    # The lock is released with the handle, so the handle is closed when nobody holds the store.
    weakref.finalize(store, os.close, handle)
    with suppress(OSError):  # a file system without locks
        fcntl.flock(handle, fcntl.LOCK_SH)
        os.utime(handle)


def try_to_own(mark: Path) -> int | None:
    """Return a handle with which no process uses the store of this mark, or can begin to; None while one does."""
    handle = os.open(mark, os.O_RDWR)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        return None
    return handle

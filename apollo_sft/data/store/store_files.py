"""The files of a store: flat arrays written in pieces, and the summary beside them."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import weakref
from array import array
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from apollo_sft.types import IGNORE_INDEX, RowRef, Sample

ARRAYS = {
    name: np.dtype(code)
    for name, code in {
        "input_ids": "<i4",
        "labels": "<i4",
        "offsets": "<i8",
        "lengths": "<i4",
        "num_targets": "<i4",
        "sources": "<i4",
        "rows": "<i8",
        "turns": "<i4",
        "turn_offsets": "<i8",
    }.items()
}
ENDS = ("offsets", "turn_offsets")
"""Where each sample ends in another array; a 0 comes first."""
HELD = 4096
BLOCK = 1 << 20
META = "meta.json"
REJECTED = "rejected.jsonl"
LAST_USED = "last_used"
NAMED_EXAMPLES = 5


@dataclass(slots=True)
class StoreSummary:
    """What became of the rows. `num_rows` = rows that gave samples + `rows_not_trained`.

    Every token of every rendering is in one of `num_tokens` (trained samples, after truncation), `tokens_cut` (cut off
    them) and `tokens_not_trained` (samples that are not trained); every target is in `num_targets` or `targets_lost`.
    `found`: how often each of `audit.FINDINGS` was met, `first`: the first rows of each, oldest first.
    `stop_tokens`: token id -> turns that end with it, most frequent first.
    `rows_bad`: rows that cannot be used. `bad`: how many for each reason; `first_bad`: the first of these rows;
    `bad_texts`: the whole message about the first one.
    """

    files: list[str]
    num_rows: int = 0
    num_samples: int = 0
    num_tokens: int = 0
    num_targets: int = 0
    num_turns: int = 0
    longest_tokens: int = 0
    longest_row: str | None = None
    rows_over_max_length: int = 0
    first_over_max_length: str | None = None
    samples_truncated: int = 0
    tokens_cut: int = 0
    targets_lost: int = 0
    rows_not_trained: int = 0
    first_not_trained: list[str] = field(default_factory=list)
    samples_not_trained: int = 0
    tokens_not_trained: int = 0
    found: dict[str, int] = field(default_factory=dict)
    first: dict[str, list[str]] = field(default_factory=dict)
    max_token_id: int = -1
    stop_tokens: dict[int, int] = field(default_factory=dict)
    rows_bad: int = 0
    bad: dict[str, int] = field(default_factory=dict)
    first_bad: dict[str, list[str]] = field(default_factory=dict)
    bad_texts: dict[str, str] = field(default_factory=dict)

    def add(self, later: StoreSummary) -> None:
        """Count in what became of the rows that follow. What it names are still the first rows."""
        if later.longest_tokens > self.longest_tokens:
            self.longest_tokens, self.longest_row = later.longest_tokens, later.longest_row
        self.first_over_max_length = self.first_over_max_length or later.first_over_max_length
        self.max_token_id = max(self.max_token_id, later.max_token_id)
        for name in COUNTS:
            setattr(self, name, getattr(self, name) + getattr(later, name))
        _extend(self.first_not_trained, later.first_not_trained)
        for mine, theirs in ((self.found, later.found), (self.stop_tokens, later.stop_tokens), (self.bad, later.bad)):
            _add_counts(mine, theirs)
        for examples, more in ((self.first, later.first), (self.first_bad, later.first_bad)):
            for name, rows in more.items():
                _extend(examples.setdefault(name, []), rows)
        self.bad_texts = later.bad_texts | self.bad_texts


COUNTS = (
    "num_rows",
    "num_samples",
    "num_tokens",
    "num_targets",
    "num_turns",
    "rows_over_max_length",
    "samples_truncated",
    "tokens_cut",
    "targets_lost",
    "rows_not_trained",
    "samples_not_trained",
    "tokens_not_trained",
    "rows_bad",
)


def _add_counts(mine: dict[Any, int], theirs: dict[Any, int]) -> None:
    for name, count in theirs.items():
        mine[name] = mine.get(name, 0) + count


def _extend(rows: list[str], more: list[str]) -> None:
    rows += more[: max(NAMED_EXAMPLES - len(rows), 0)]


@dataclass(frozen=True, slots=True)
class Rejected:
    """A row, or one of its samples, that is not trained (`trained` false) or not whole. `turns`: of the sample.

    `tokens_lost`, `targets_lost`: what of it is not trained. 0 for a row that could not be rendered.
    `unwritten`: the turns are trained without a part that the template does not write.
    """

    file: str
    row: int
    turns: tuple[int, ...]
    trained: bool
    reason: str
    tokens_lost: int
    targets_lost: int
    unwritten: bool = False


def count_targets(sample: Sample) -> int:
    """As `Sample.num_targets`, quicker."""
    return int(np.count_nonzero(sample.labels != IGNORE_INDEX))


class ArrayWriter:
    """One flat .npy file that grows. The header is written last, so an unfinished file is not an array."""

    def __init__(self, path: Path, dtype: np.dtype[Any]) -> None:
        self.dtype = dtype
        self.length = 0
        self.file: BinaryIO = path.open("wb")
        self.header_bytes = self._write_header(0)

    def append(self, values: np.ndarray) -> None:
        self.file.write(np.ascontiguousarray(values, dtype=self.dtype).tobytes())
        self.length += len(values)

    def close(self, synced: bool) -> None:
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
    """Writes samples one by one. Memory holds `HELD` numbers an array, however many samples there are."""

    def __init__(self, folder: Path, files: list[str]) -> None:
        self.folder = folder
        self.files = files
        self.file_index = {file: index for index, file in enumerate(files)}
        self.arrays = {name: ArrayWriter(folder / f"{name}.npy", dtype) for name, dtype in ARRAYS.items()}
        self.held = {name: array(dtype.char) for name, dtype in ARRAYS.items()}
        self.num_tokens = self.num_turns = 0
        for name in ENDS:
            self.held[name].append(0)
        self.rejected = (folder / REJECTED).open("w", encoding="utf-8")

    def reject(self, rejected: Rejected) -> None:
        self.rejected.write(json.dumps(asdict(rejected), ensure_ascii=False) + "\n")

    def add(self, sample: Sample) -> None:
        if sample.ref.file not in self.file_index:  # a class of the user's names its rows as it likes
            self.file_index[sample.ref.file] = len(self.files)
            self.files.append(sample.ref.file)
        self.arrays["input_ids"].append(sample.input_ids)
        self.arrays["labels"].append(sample.labels)
        self.num_tokens += len(sample.input_ids)
        self.num_turns += len(sample.turns)
        held = self.held
        held["offsets"].append(self.num_tokens)
        held["lengths"].append(len(sample.input_ids))
        held["num_targets"].append(count_targets(sample))
        held["sources"].append(self.file_index[sample.ref.file])
        held["rows"].append(sample.ref.row)
        held["turns"].extend(sample.turns)
        held["turn_offsets"].append(self.num_turns)
        if len(held["lengths"]) >= HELD:
            self._let_go()

    def take(self, part: Path) -> None:
        """Add all that another writer has closed in the folder `part`. It must know the same files."""
        self._let_go()
        before = {"offsets": self.num_tokens, "turn_offsets": self.num_turns}
        for name, writer in self.arrays.items():
            for block in _blocks(part / f"{name}.npy", skip=int(name in ENDS)):
                writer.append(block + before[name] if name in ENDS else block)
        self.num_tokens, self.num_turns = self.arrays["input_ids"].length, self.arrays["turns"].length
        with (part / REJECTED).open(encoding="utf-8") as file:
            shutil.copyfileobj(file, self.rejected)

    def close(self, synced: bool) -> None:
        """All of it written; on disk if `synced`."""
        self._let_go()
        for writer in self.arrays.values():
            writer.close(synced)
        self.rejected.flush()
        if synced:
            os.fsync(self.rejected.fileno())
        self.rejected.close()

    def finish(self, key: str, summary: StoreSummary) -> None:
        """Write what is held, `meta.json` last, all of it on disk when this returns."""
        self.close(synced=True)
        text = json.dumps({"key": key, "summary": asdict(summary)}, indent=1)
        with (self.folder / META).open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())

    def abandon(self) -> None:
        for writer in self.arrays.values():
            writer.file.close()
        self.rejected.close()

    def _let_go(self) -> None:
        for name, values in self.held.items():
            if values:
                self.arrays[name].append(np.frombuffer(values, dtype=ARRAYS[name]))
                self.held[name] = array(values.typecode)


def _blocks(path: Path, skip: int) -> Iterator[np.ndarray]:
    """A flat .npy file in pieces, without its first `skip` numbers."""
    with path.open("rb") as file:
        np.lib.format.read_magic(file)
        (length,), _, dtype = np.lib.format.read_array_header_1_0(file)
        file.seek(skip * dtype.itemsize, os.SEEK_CUR)
        for first in range(skip, length, BLOCK):
            yield np.frombuffer(file.read(min(BLOCK, length - first) * dtype.itemsize), dtype=dtype)


class SampleStore:
    """The samples of a dataset, read-only and memory-mapped: opening it costs nothing that grows with tokens.

    `lengths`, `num_targets`: int32 of shape (samples,). `sources`, `rows`: index of the file, and the row in it.
    As long as it lives, a folder made by `prepare_store` is marked as in use.
    """

    def __init__(self, folder: Path) -> None:
        _mark_as_used(self, folder / LAST_USED)
        meta = json.loads((folder / META).read_text(encoding="utf-8"))
        meta["summary"]["stop_tokens"] = {int(k): v for k, v in meta["summary"]["stop_tokens"].items()}
        self.folder = folder
        self.key: str = meta["key"]
        self.summary = StoreSummary(**meta["summary"])
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
        """Token ids and labels of sample `i`."""
        first, end = int(self._offsets[i]), int(self._offsets[i + 1])
        return self._ids[first:end], self._labels[first:end]

    def rejected(self) -> Iterator[Rejected]:
        """Every row that is not trained or not whole, in the order of the rows."""
        with (self.folder / REJECTED).open(encoding="utf-8") as file:
            for line in file:
                entry = json.loads(line)
                yield Rejected(**entry | {"turns": tuple(entry["turns"])})

    def ref(self, i: int) -> RowRef:
        return RowRef(self.summary.files[int(self.sources[i])], int(self.rows[i]))


def _open(folder: Path, name: str) -> np.ndarray:
    """Raises: ValueError or OSError for a file that is missing, cut short or no array."""
    path = folder / f"{name}.npy"
    return np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))


def _mark_as_used(store: SampleStore, mark: Path) -> None:
    """A shared lock until `store` is gone, and the time of today. A folder that cannot be written gets no such mark.

    Waits while another process looks whether the store is in use, or removes it.
    """
    try:
        handle = os.open(mark, os.O_RDWR)
    except OSError:
        return
    weakref.finalize(store, os.close, handle)
    with suppress(OSError):  # a file system without locks
        fcntl.flock(handle, fcntl.LOCK_SH)
        os.utime(handle)


def try_to_own(mark: Path) -> int | None:
    """A handle with which no process uses the store of this mark, or can begin to; None while one does."""
    handle = os.open(mark, os.O_RDWR)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        return None
    return handle

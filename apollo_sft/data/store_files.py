"""The files of a store: flat arrays written in pieces, and the summary beside them."""

from __future__ import annotations

import json
import os
from array import array
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from apollo_sft.types import IGNORE_INDEX, RowRef, Sample

TOKEN_DTYPE = np.dtype("<i4")
META = "meta.json"
REJECTED = "rejected.jsonl"


@dataclass(slots=True)
class StoreSummary:
    """What became of the rows. `num_rows` = rows that gave samples + `rows_not_trained`.

    Every token of every rendering is in one of `num_tokens` (trained samples, after truncation), `tokens_cut` (cut off
    them) and `tokens_not_trained` (samples that are not trained); every target is in `num_targets` or `targets_lost`.
    `found`: how often each of `audit.FINDINGS` was met, `first`: the first rows of each, oldest first.
    `stop_tokens`: token id -> turns that end with it, most frequent first.
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

    def close(self) -> None:
        self.file.seek(0)
        written = self._write_header(self.length)
        assert written == self.header_bytes, "numpy pads the header of a flat array to one size"
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()

    def _write_header(self, length: int) -> int:
        header = {"descr": np.lib.format.dtype_to_descr(self.dtype), "fortran_order": False, "shape": (length,)}
        np.lib.format.write_array_header_1_0(self.file, header)
        return self.file.tell()


class StoreWriter:
    """Writes samples one by one; memory holds a few integers a sample, never tokens."""

    def __init__(self, folder: Path, files: list[str]) -> None:
        self.folder = folder
        self.files = files
        self.file_index = {file: index for index, file in enumerate(files)}
        self.ids = ArrayWriter(folder / "input_ids.npy", TOKEN_DTYPE)
        self.labels = ArrayWriter(folder / "labels.npy", TOKEN_DTYPE)
        self.offsets = array("q", [0])
        self.lengths = array("i")
        self.num_targets = array("i")
        self.sources = array("i")
        self.rows = array("q")
        self.turns = array("i")
        self.turn_offsets = array("q", [0])
        self.rejected = (folder / REJECTED).open("w", encoding="utf-8")

    def reject(self, rejected: Rejected) -> None:
        self.rejected.write(json.dumps(asdict(rejected), ensure_ascii=False) + "\n")

    def add(self, sample: Sample) -> None:
        self.ids.append(sample.input_ids)
        self.labels.append(sample.labels)
        self.offsets.append(self.ids.length)
        self.lengths.append(len(sample.input_ids))
        self.num_targets.append(count_targets(sample))
        if sample.ref.file not in self.file_index:  # a class of the user's names its rows as it likes
            self.file_index[sample.ref.file] = len(self.files)
            self.files.append(sample.ref.file)
        self.sources.append(self.file_index[sample.ref.file])
        self.rows.append(sample.ref.row)
        self.turns.extend(sample.turns)
        self.turn_offsets.append(len(self.turns))

    def finish(self, key: str, summary: StoreSummary) -> None:
        """Write what is in memory, `meta.json` last, all of it on disk when this returns."""
        self.ids.close()
        self.labels.close()
        self.rejected.flush()
        os.fsync(self.rejected.fileno())
        self.rejected.close()
        for name, values, code in (
            ("offsets", self.offsets, "<i8"),
            ("lengths", self.lengths, "<i4"),
            ("num_targets", self.num_targets, "<i4"),
            ("sources", self.sources, "<i4"),
            ("rows", self.rows, "<i8"),
            ("turns", self.turns, "<i4"),
            ("turn_offsets", self.turn_offsets, "<i8"),
        ):
            writer = ArrayWriter(self.folder / f"{name}.npy", np.dtype(code))
            writer.append(np.frombuffer(values, dtype=values.typecode) if len(values) else np.zeros(0, code))
            writer.close()
        text = json.dumps({"key": key, "summary": asdict(summary)}, indent=1)
        with (self.folder / META).open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())

    def abandon(self) -> None:
        self.ids.file.close()
        self.labels.file.close()
        self.rejected.close()


class SampleStore:
    """The samples of a dataset, read-only and memory-mapped: opening it costs nothing that grows with tokens.

    `lengths`, `num_targets`: int32 of shape (samples,). `sources`, `rows`: index of the file, and the row in it.
    """

    def __init__(self, folder: Path) -> None:
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

"""Tokenise once: rows -> a memory-mapped store, found again by what it is made of."""

from __future__ import annotations

import errno
import gc
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock, Timeout

from apollo_sft.config.schema import DataConfig
from apollo_sft.data.conversation import check_conversation, needed_columns, parse_row
from apollo_sft.data.custom import custom_rows
from apollo_sft.data.fingerprint import store_key
from apollo_sft.data.parquet import Row, expand_paths, num_rows, try_rows
from apollo_sft.data.render import Rendered, Renderer, truncate
from apollo_sft.data.store_files import Rejected, SampleStore, StoreSummary, StoreWriter, count_targets
from apollo_sft.data.template import ChatTemplate
from apollo_sft.errors import DataError
from apollo_sft.types import Conversation, RowRef, Sample

__all__ = ["SampleStore", "StoreRequest", "StoreSummary", "prepare_store"]

CHUNK_ROWS = 512
SAY_EVERY_SECONDS = 5.0
NAMED_EXAMPLES = 5

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class StoreRequest:
    """What a store is made of. `paths` are files, folders or globs; `max_rows` counts over all of them (-1: all)."""

    split: Literal["train", "val"]
    paths: Sequence[str]
    max_rows: int
    tokenizer: Any
    template: ChatTemplate
    data: DataConfig

    @property
    def files_key(self) -> str:
        return f"data.{self.split}_files"


def prepare_store(request: StoreRequest, say: Say) -> SampleStore:
    """The store of this request, built by the first of any number of processes and opened by the others.

    Raises: DataError for a file, row, template or tokenizer that cannot be used, for rows over `data.max_length`
    under `data.truncation=error`, and for a dataset without a target.
    """
    asked = time.time_ns()
    files = expand_paths(request.paths, request.files_key)
    root = store_root(request.data)
    try:
        root.mkdir(parents=True, exist_ok=True)
        key = store_key(files, request.max_rows, request.tokenizer, request.template, request.data, root / "hashes")
        folder = root / key
        store = _open_store(folder)
        if store is None:
            with _locked(root / f"{key}.lock", say):
                store = _open_store(folder) or _build(request, files, folder, say, asked)
    except OSError as error:
        raise DataError(
            f"data.store_dir: the tokenised data cannot be kept in {root}",
            found=error.strerror or str(error),
            expected="a folder that can be written" + (" with more room" if error.errno == errno.ENOSPC else ""),
            fix="data.store_dir=FOLDER",
        ) from error
    return store


def store_root(data: DataConfig) -> Path:
    """`data.store_dir`, or a folder in the user's cache."""
    if data.store_dir is not None:
        return Path(data.store_dir).expanduser()
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(cache).expanduser() / "apollo-sft" / "store"


def _open_store(folder: Path) -> SampleStore | None:
    """None when there is none, or when it is damaged: then it is built again."""
    try:
        return SampleStore(folder)
    except (OSError, ValueError, KeyError, TypeError):
        return None


@contextmanager
def _locked(path: Path, say: Say) -> Iterator[None]:
    """The lock of one key. It is the system's, so it ends with the process that holds it."""
    lock = FileLock(path)
    try:
        lock.acquire(timeout=1.0)
    except Timeout:
        say("another process tokenises the same data: waiting for it")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _build(request: StoreRequest, files: list[str], folder: Path, say: Say, asked: int) -> SampleStore:
    """Build under the lock. What others of this key left unfinished is removed: whoever wrote it is dead."""
    failed = folder.with_name(f"{folder.name}.error")
    if failed.is_file() and failed.stat().st_mtime_ns > asked:
        raise DataError(failed.read_text(encoding="utf-8"))
    building = folder.with_name(f".building-{folder.name}")
    for left in (building, folder):
        shutil.rmtree(left, ignore_errors=True)
    failed.unlink(missing_ok=True)
    building.mkdir()
    try:
        _Builder(request, files, building, say).run(folder.name)
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


class _Builder:
    """One pass over the rows."""

    def __init__(self, request: StoreRequest, files: list[str], folder: Path, say: Say) -> None:
        self.request = request
        self.data = request.data
        self.files = files
        self.say = say
        self.renderer = Renderer(request.tokenizer, request.template, request.data)
        self.summary = StoreSummary(files=files)
        self.writer = StoreWriter(folder, files)

    def run(self, key: str) -> None:
        try:
            self._read_all()
            self._finish_summary()
            self._refuse_over_length()
            self._refuse_no_target()
            self.writer.finish(key, self.summary)
        finally:
            self.writer.abandon()

    def _read_all(self) -> None:
        rows, total = self._rows()
        start = said = time.monotonic()
        gc.freeze()  # what the program holds already is looked through at no collection
        for chunk in _chunks(rows, CHUNK_ROWS):
            self._chunk(chunk)
            now = time.monotonic()
            if now - said > SAY_EVERY_SECONDS:
                said = now
                done = self.summary.num_rows
                self.say(f"tokenised {done:,}{total} rows, {done / (now - start):,.0f} rows/s")
        gc.unfreeze()
        seconds = max(time.monotonic() - start, 1e-9)
        done = self.summary.num_rows
        self.say(f"tokenised {done:,} {self.request.split} rows in {seconds:.1f} s, {done / seconds:,.0f} rows/s")

    def _rows(self) -> tuple[Iterator[tuple[RowRef, Any]], str]:
        """The rows, and ` of N` where their number is known."""
        limit = self.request.max_rows
        if self.data.custom_cls.path is not None:
            return custom_rows(self.files, self.request.tokenizer, self.data, limit), ""
        total = num_rows(self.files)
        total = min(total, limit) if limit >= 0 else total
        return try_rows(self.files, needed_columns(self.data), limit), f" of {total:,}"

    def _chunk(self, chunk: Sequence[tuple[RowRef, Row | Conversation | Sample | DataError]]) -> None:
        parsed = [self._try_parse(row, ref) for ref, row in chunk]
        rendered = iter(self.renderer.try_render([c for c in parsed if isinstance(c, Conversation)]))
        results = [next(rendered) if isinstance(c, Conversation) else c for c in parsed]
        self._refuse_bad_rows([result for result in results if isinstance(result, DataError)], len(chunk))
        for (ref, _), result in zip(chunk, results, strict=True):
            if isinstance(result, Rendered):
                self._row(ref, result)
            else:
                self._skip(ref, result)

    def _try_parse(
        self, row: Row | Conversation | Sample | DataError, ref: RowRef
    ) -> Conversation | Rendered | DataError:
        if isinstance(row, DataError):
            return row
        if isinstance(row, Sample):
            return Rendered([row])
        try:
            return check_conversation(row) if isinstance(row, Conversation) else parse_row(row, ref, self.data)
        except DataError as error:
            return error

    def _refuse_bad_rows(self, errors: list[DataError], num_read: int) -> None:
        if not errors or self.data.bad_rows == "skip":
            return
        if len(errors) == 1:
            raise errors[0]
        raise DataError(f"{errors[0]}\n  besides:  {len(errors) - 1} more of the {num_read} rows read with it fail")

    def _row(self, ref: RowRef, row: Rendered) -> None:
        summary = self.summary
        summary.num_rows += 1
        longest = max((len(sample.input_ids) for sample in row.samples), default=0)
        if longest > summary.longest_tokens:
            summary.longest_tokens, summary.longest_row = longest, str(ref)
        if longest > self.data.max_length:
            summary.rows_over_max_length += 1
            summary.first_over_max_length = summary.first_over_max_length or f"{ref} ({longest:,} tokens)"
            if self.data.truncation == "error":
                return
        left_out, why = row.left_out
        if left_out:
            self.writer.reject(Rejected(ref.file, ref.row, left_out, bool(row.samples), why, 0, 0))
        for parts, turns in row.unwritten.items():
            reason = f"replies trained without their {' and '.join(parts)}, which the template does not write"
            self.writer.reject(Rejected(ref.file, ref.row, tuple(turns), True, reason, 0, 0, unwritten=True))
        trained = [self._sample(sample, row.dropped) for sample in row.samples]
        if not any(trained):
            self._not_trained(ref)

    def _skip(self, ref: RowRef, error: DataError) -> None:
        self.summary.num_rows += 1
        self.writer.reject(Rejected(ref.file, ref.row, (), False, str(error), 0, 0))
        self._not_trained(ref)

    def _not_trained(self, ref: RowRef) -> None:
        self.summary.rows_not_trained += 1
        if len(self.summary.first_not_trained) < NAMED_EXAMPLES:
            self.summary.first_not_trained.append(str(ref))

    def _sample(self, whole: Sample, dropped: str | None) -> bool:
        """Whether the sample is trained. What is not trained of it is counted and kept in the ledger."""
        data, summary, writer = self.data, self.summary, self.writer
        sample = truncate(whole, data.max_length, data.truncation, self.request.tokenizer.bos_token_id)
        tokens, targets = len(whole.input_ids), count_targets(whole)
        kept = targets if sample is whole else count_targets(sample)
        if sample is not whole and data.truncation == "drop":
            dropped = dropped or f"{tokens:,} tokens, more than data.max_length (data.truncation=drop)"
        elif not kept:
            dropped = dropped or (
                f"no target is left (data.truncation={data.truncation})" if targets else "nothing in it is trained"
            )
        where = (whole.ref.file, whole.ref.row, whole.turns)
        if dropped is not None:
            summary.samples_not_trained += 1
            summary.tokens_not_trained += tokens
            summary.targets_lost += targets
            writer.reject(Rejected(*where, False, dropped, tokens, targets))
            return False
        tokens_lost, targets_lost = tokens - len(sample.input_ids), targets - kept
        summary.num_samples += 1
        summary.num_tokens += len(sample.input_ids)
        summary.num_targets += kept
        summary.tokens_cut += tokens_lost
        summary.targets_lost += targets_lost
        summary.max_token_id = max(summary.max_token_id, int(sample.input_ids.max()))
        if sample is not whole:
            summary.samples_truncated += 1
            reason = (
                f"cut on the {data.truncation}: {tokens_lost:,} of {tokens:,} tokens, {targets_lost:,} of them targets"
            )
            writer.reject(Rejected(*where, True, reason, tokens_lost, targets_lost))
        writer.add(sample)
        return True

    def _finish_summary(self) -> None:
        counts, summary = self.renderer.counts, self.summary
        summary.num_turns = counts.turns
        summary.found = dict(counts.found)
        summary.first = counts.first
        summary.stop_tokens = dict(counts.stop_tokens.most_common())

    def _refuse_over_length(self) -> None:
        summary, data = self.summary, self.data
        if data.truncation != "error" or not summary.rows_over_max_length:
            return
        raise DataError(
            f"{summary.rows_over_max_length:,} of {summary.num_rows:,} rows are longer than data.max_length",
            found=f"first: {summary.first_over_max_length}; longest: {summary.longest_row} "
            f"({summary.longest_tokens:,} tokens)",
            expected=f"at most {data.max_length:,} tokens",
            fix=f"data.max_length={summary.longest_tokens}, or data.truncation=right or left (the side that is cut)",
        )

    def _refuse_no_target(self) -> None:
        summary = self.summary
        if summary.num_targets:
            return
        if not summary.num_rows:
            raise DataError(f"{self.request.files_key}: there is no row", found=", ".join(self.files))
        raise DataError(
            f"{self.request.files_key}: no row has a token to train on",
            found=f"{summary.num_rows:,} rows, {summary.targets_lost:,} targets cut or dropped",
            expected="at least one target",
            fix=f"data.max_length={summary.longest_tokens}" if summary.targets_lost else None,
        )


def _chunks(rows: Iterator[tuple[RowRef, Any]], size: int) -> Iterator[list[tuple[RowRef, Any]]]:
    while chunk := list(islice(rows, size)):
        yield chunk

"""Turn rows into samples in a store, chunk by chunk, with a summary of each chunk: the work of one process."""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal

from apollo_sft.config.schema import DataConfig
from apollo_sft.data.read.conversation import check_conversation, needed_columns, parse_row
from apollo_sft.data.read.files import Row
from apollo_sft.data.read.rows import try_rows
from apollo_sft.data.render.counts import RenderCounts
from apollo_sft.data.render.render import Rendered, Renderer, truncate
from apollo_sft.data.render.template import ChatTemplate
from apollo_sft.data.store.store_files import Rejected, StoreWriter, count_targets
from apollo_sft.data.store.summary import StoreSummary
from apollo_sft.errors import DataError
from apollo_sft.types import Conversation, RowRef, Sample

CHUNK_ROWS = 512

Item = Row | Conversation | Sample | DataError


@dataclass(frozen=True, slots=True)
class StoreRequest:
    """The inputs of a store."""

    split: Literal["train", "val"]

    paths: Sequence[str]
    """Files, folders or globs."""

    max_rows: int
    """Counted over all files; -1: all rows."""

    tokenizer: Any
    template: ChatTemplate
    data: DataConfig

    processes: int | None = None
    """Processes that tokenise; None: as many as are worth their start. The store is the same."""

    @property
    def files_key(self) -> str:
        """Return the config key that names the files."""
        return f"data.{self.split}_files"


@dataclass(frozen=True, slots=True)
class Stretch:
    """Rows [first, first + number) of a file."""

    file: str
    first: int
    number: int


@dataclass(frozen=True, slots=True)
class Shard:
    """Rows that one process tokenises in one go. Its first row is a multiple of `CHUNK_ROWS`, counted over all files,
    so that chunks are the same however many shards there are.
    """

    index: int
    stretches: tuple[Stretch, ...]


def shard_rows(shard: Shard, data: DataConfig) -> Iterator[tuple[RowRef, Item]]:
    """Yield the rows of a shard, the error of a row in its place."""
    columns = needed_columns(data)
    for stretch in shard.stretches:
        yield from try_rows([stretch.file], columns, stretch.number, stretch.first)


class Tokeniser:
    """Writes the samples of one request. What is counted in a chunk depends on its rows alone."""

    def __init__(self, request: StoreRequest) -> None:
        self.data = request.data
        self.bos = request.tokenizer.bos_token_id
        self.renderer = Renderer(request.tokenizer, request.template, request.data)

    def run(self, rows: Iterable[tuple[RowRef, Item]], writer: StoreWriter) -> Iterator[StoreSummary]:
        """Yield the summary of each chunk, when its samples are written.

        Raises: DataError for a file, a template or a tokenizer, but for no single row.
        """
        # Rows make many small objects, so collections are frequent: they need not visit what the program has already.
        gc.freeze()
        for chunk in _chunks(iter(rows), CHUNK_ROWS):
            yield _Chunk(self, writer).run(chunk)
        gc.unfreeze()


class _Chunk:
    """Writes the samples of some rows, and counts them."""

    def __init__(self, tokeniser: Tokeniser, writer: StoreWriter) -> None:
        self.data = tokeniser.data
        self.bos = tokeniser.bos
        self.renderer = tokeniser.renderer
        self.writer = writer
        self.summary = StoreSummary(files=[])

    def run(self, chunk: Sequence[tuple[RowRef, Item]]) -> StoreSummary:
        self.renderer.counts = RenderCounts()
        parsed = [self._try_parse(row, ref) for ref, row in chunk]
        conversations = [item for item in parsed if isinstance(item, Conversation)]
        rendered = iter(self.renderer.try_render(conversations))
        for (ref, _), item in zip(chunk, parsed, strict=True):
            # Ready samples and errors keep their place among the rows that were rendered.
            result = next(rendered) if isinstance(item, Conversation) else item
            if isinstance(result, Rendered):
                self._add_row(ref, result)
            else:
                self._add_bad(ref, result)
        return self._finished()

    def _finished(self) -> StoreSummary:
        counts = self.renderer.counts
        self.summary.num_turns = counts.turns
        self.summary.findings = counts.findings
        self.summary.stop_tokens = dict(counts.stop_tokens)
        return self.summary

    def _try_parse(self, row: Item, ref: RowRef) -> Conversation | Rendered | DataError:
        if isinstance(row, DataError):
            return row
        if isinstance(row, Sample):
            return Rendered([row])
        try:
            if isinstance(row, Conversation):
                return check_conversation(row)
            return parse_row(row, ref, self.data)
        except DataError as error:
            return error

    def _add_row(self, ref: RowRef, row: Rendered) -> None:
        summary = self.summary
        summary.num_rows += 1
        longest = max((len(sample.input_ids) for sample in row.samples), default=0)
        if longest > summary.longest_tokens:
            summary.longest_tokens = longest
            summary.longest_row = str(ref)
        if longest > self.data.max_length:
            summary.over_max_length.add(f"{ref} ({longest:,} tokens)")
            # The store is refused when all rows are seen, so nothing of it is needed any more.
            if self.data.truncation == "error":
                return

        left_out, why = row.left_out
        if left_out:
            self.writer.reject(Rejected(ref.file, ref.row, left_out, bool(row.samples), why, 0, 0))
        for parts, turns in row.unwritten.items():
            reason = f"replies trained without their {' and '.join(parts)}, which the template does not write"
            self._add_unwritten(ref, turns, parts, reason)

        for lost in row.lost:
            self._add_unwritten(ref, lost.messages, (lost.key,), lost.reason)

        trained = [self._add_sample(sample, row.dropped) for sample in row.samples]
        if not any(trained):
            summary.not_trained.add(str(ref))

    def _add_unwritten(self, ref: RowRef, messages: Sequence[int], keys: tuple[str, ...], reason: str) -> None:
        place = (ref.file, ref.row, tuple(messages))
        self.writer.reject(Rejected(*place, True, reason, 0, 0, unwritten=True, keys=keys))

    def _add_bad(self, ref: RowRef, error: DataError) -> None:
        from apollo_sft.data.store.bad_rows import count_bad

        self.summary.num_rows += 1
        count_bad(self.summary, str(ref), error)
        self.writer.reject(Rejected(ref.file, ref.row, (), False, str(error), 0, 0))
        self.summary.not_trained.add(str(ref))

    def _add_sample(self, whole: Sample, dropped: str | None) -> bool:
        """Write a sample and return whether it is trained. What is not trained of it goes into counts and ledger."""
        sample = truncate(whole, self.data.max_length, self.data.truncation, self.bos)
        targets = count_targets(whole)
        kept = targets if sample is whole else count_targets(sample)
        dropped = dropped or self._why_dropped(whole, is_cut=sample is not whole, targets=targets, kept=kept)
        if dropped is not None:
            self._add_dropped(whole, dropped, targets)
            return False

        self._add_trained(sample, kept)
        if sample is not whole:
            self._add_cut(whole, len(whole.input_ids) - len(sample.input_ids), targets - kept)
        self.writer.add(sample)
        return True

    def _why_dropped(self, whole: Sample, is_cut: bool, targets: int, kept: int) -> str | None:
        """Return why a sample is not trained, None where it is. `targets`: before truncation, `kept`: after it."""
        if is_cut and self.data.truncation == "drop":
            return f"{len(whole.input_ids):,} tokens, more than data.max_length (data.truncation=drop)"
        if kept:
            return None
        if targets:
            return f"no target is left (data.truncation={self.data.truncation})"
        return "nothing in it is trained"

    def _add_dropped(self, whole: Sample, reason: str, targets: int) -> None:
        tokens = len(whole.input_ids)
        self.summary.samples_not_trained += 1
        self.summary.tokens_not_trained += tokens
        self.summary.targets_lost += targets
        self.writer.reject(Rejected(whole.ref.file, whole.ref.row, whole.turns, False, reason, tokens, targets))

    def _add_trained(self, sample: Sample, targets: int) -> None:
        summary = self.summary
        summary.num_samples += 1
        summary.num_tokens += len(sample.input_ids)
        summary.num_targets += targets
        summary.max_token_id = max(summary.max_token_id, int(sample.input_ids.max()))

    def _add_cut(self, whole: Sample, tokens_lost: int, targets_lost: int) -> None:
        self.summary.samples_truncated += 1
        self.summary.tokens_cut += tokens_lost
        self.summary.targets_lost += targets_lost
        reason = (
            f"cut on the {self.data.truncation}: {tokens_lost:,} of {len(whole.input_ids):,} tokens, "
            f"{targets_lost:,} of them targets"
        )
        place = (whole.ref.file, whole.ref.row, whole.turns)
        self.writer.reject(Rejected(*place, True, reason, tokens_lost, targets_lost))


def _chunks(rows: Iterator[tuple[RowRef, Item]], size: int) -> Iterator[list[tuple[RowRef, Item]]]:
    chunk = list(islice(rows, size))
    while chunk:
        yield chunk
        chunk = list(islice(rows, size))

"""Rows -> samples in a store, chunk by chunk, with a summary of each chunk: the work of one process."""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any, Literal

from apollo_sft.config.schema import DataConfig
from apollo_sft.data.read.conversation import check_conversation, needed_columns, parse_row
from apollo_sft.data.read.files import Row
from apollo_sft.data.read.rows import try_rows
from apollo_sft.data.render.counts import RenderCounts
from apollo_sft.data.render.render import Rendered, Renderer, truncate
from apollo_sft.data.render.template import ChatTemplate
from apollo_sft.data.store.store_files import NAMED_EXAMPLES, Rejected, StoreSummary, StoreWriter, count_targets
from apollo_sft.errors import DataError
from apollo_sft.types import Conversation, RowRef, Sample

CHUNK_ROWS = 512

Item = Row | Conversation | Sample | DataError


@dataclass(frozen=True, slots=True)
class StoreRequest:
    """What a store is made of. `paths` are files, folders or globs; `max_rows` counts over all of them (-1: all).

    `processes`: how many tokenise; None chooses. The store is the same.
    """

    split: Literal["train", "val"]
    paths: Sequence[str]
    max_rows: int
    tokenizer: Any
    template: ChatTemplate
    data: DataConfig
    processes: int | None = None

    @property
    def files_key(self) -> str:
        return f"data.{self.split}_files"


@dataclass(frozen=True, slots=True)
class Stretch:
    """Rows [first, first + number) of a file."""

    file: str
    first: int
    number: int


@dataclass(frozen=True, slots=True)
class Shard:
    """Rows that one process tokenises in one go. Its first row is a multiple of `CHUNK_ROWS`, counted over all files:
    so chunks are the same however many shards there are.
    """

    index: int
    stretches: tuple[Stretch, ...]


def shard_rows(shard: Shard, data: DataConfig) -> Iterator[tuple[RowRef, Item]]:
    columns = needed_columns(data)
    return chain.from_iterable(
        try_rows([stretch.file], columns, stretch.number, stretch.first) for stretch in shard.stretches
    )


class Tokeniser:
    """Writes the samples of one request. What is found in a chunk depends on its rows alone."""

    def __init__(self, request: StoreRequest) -> None:
        self.data = request.data
        self.bos = request.tokenizer.bos_token_id
        self.renderer = Renderer(request.tokenizer, request.template, request.data)

    def run(self, rows: Iterable[tuple[RowRef, Item]], writer: StoreWriter) -> Iterator[StoreSummary]:
        """The summary of each chunk, when its samples are written.

        Raises: DataError for a file, a template or a tokenizer, but for no single row.
        """
        gc.freeze()  # what the program holds already is looked through at no collection
        for chunk in _chunks(iter(rows), CHUNK_ROWS):
            yield _Chunk(self, writer).run(chunk)
        gc.unfreeze()


class _Chunk:
    """Some rows, and what became of them."""

    def __init__(self, tokeniser: Tokeniser, writer: StoreWriter) -> None:
        self.data = tokeniser.data
        self.bos = tokeniser.bos
        self.renderer = tokeniser.renderer
        self.writer = writer
        self.summary = StoreSummary(files=[])

    def run(self, chunk: Sequence[tuple[RowRef, Item]]) -> StoreSummary:
        self.renderer.counts = RenderCounts()
        parsed = [self._try_parse(row, ref) for ref, row in chunk]
        rendered = iter(self.renderer.try_render([c for c in parsed if isinstance(c, Conversation)]))
        results = [next(rendered) if isinstance(c, Conversation) else c for c in parsed]
        for (ref, _), result in zip(chunk, results, strict=True):
            if isinstance(result, Rendered):
                self.row(ref, result)
            else:
                self._skip(ref, result)
        return self.finished()

    def finished(self) -> StoreSummary:
        counts, summary = self.renderer.counts, self.summary
        summary.num_turns = counts.turns
        summary.found = {name: tally.count for name, tally in counts.findings.items()}
        summary.first = {name: tally.examples for name, tally in counts.findings.items()}
        summary.stop_tokens = dict(counts.stop_tokens)
        return summary

    def _try_parse(self, row: Item, ref: RowRef) -> Conversation | Rendered | DataError:
        if isinstance(row, DataError):
            return row
        if isinstance(row, Sample):
            return Rendered([row])
        try:
            return check_conversation(row) if isinstance(row, Conversation) else parse_row(row, ref, self.data)
        except DataError as error:
            return error

    def row(self, ref: RowRef, row: Rendered) -> None:
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
        from apollo_sft.data.store.bad_rows import count_bad

        count_bad(self.summary, str(ref), error)
        self.writer.reject(Rejected(ref.file, ref.row, (), False, str(error), 0, 0))
        self._not_trained(ref)

    def _not_trained(self, ref: RowRef) -> None:
        self.summary.rows_not_trained += 1
        if len(self.summary.first_not_trained) < NAMED_EXAMPLES:
            self.summary.first_not_trained.append(str(ref))

    def _sample(self, whole: Sample, dropped: str | None) -> bool:
        """Whether the sample is trained. What is not trained of it is counted and kept in the ledger."""
        data, summary, writer = self.data, self.summary, self.writer
        sample = truncate(whole, data.max_length, data.truncation, self.bos)
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


def _chunks(rows: Iterator[tuple[RowRef, Item]], size: int) -> Iterator[list[tuple[RowRef, Item]]]:
    while chunk := list(islice(rows, size)):
        yield chunk

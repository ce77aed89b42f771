"""Write an inspection as a report: its parts, their order and their words."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from apollo_sft.data.batch.plan import steps_per_epoch
from apollo_sft.data.store.audit import SOURCE_HEADER, decoded, source_rows, target_mask, visible
from apollo_sft.data.store.store_files import SampleStore
from apollo_sft.report.document import (
    Bars,
    Block,
    Document,
    Facts,
    Figures,
    Level,
    Note,
    Notes,
    Passage,
    Passages,
    Table,
    Token,
)
from apollo_sft.tools.inspect.counts import FileCounts, Found, Loss, histogram
from apollo_sft.tools.inspect.inspection import IN_THE_LEDGER, Inspection, Pick, Split, rows_in_words
from apollo_sft.train.announce import steps_in_words

LOST: dict[str, tuple[Level, str]] = {
    "refused": ("bad", "refused"),
    "dropped": ("bad", "dropped"),
    "cut": ("bad", "cut"),
    "incomplete": ("bad", "with something that the template does not write"),
    "left out": ("warning", "with turns left out"),
    "set aside": ("warning", "set aside"),
}
NONE = "–"
Clean = Callable[[str], str]
"""Makes a text harmless for a terminal, and leaves out the folder that all files are in."""
MOST_TOKENS = 12
"""Tokens that may form one character; after so many they are shown as they are."""


def document(found: Inspection, picks: Sequence[tuple[Split, Pick]], whole: bool, first: bool = False) -> Document:
    """Return the report. `picks`: the samples to show. `whole`: in a terminal, too, they are not shortened.

    `first`: show the first of them before all figures.
    """
    prepared = found.prepared
    files = itertools.chain.from_iterable(split.files for split in found.splits)
    folder = _common_folder([file.file for file in files])

    def clean(text: str) -> str:
        if folder:
            text = text.replace(folder, "")
        return visible(text)

    passages = [sample_passage(split.store, pick, prepared.tokenizer, clean, whole) for split, pick in picks]
    blocks: list[Block] = [_figures(found.splits[0]), Notes("What was found", list(_notes(found, clean)))]
    title = "Samples"
    if first:
        blocks.append(Passages("One of the samples", passages[:1]))
        passages = passages[1:]
        title = "More samples"

    blocks += [
        _files(found, folder),
        *_sources(found),
        _losses(found, clean),
        Facts("What a training would do", _facts(found)),
    ]
    blocks += [_lengths(split, clean) for split in found.splits]
    blocks.append(Passages(title, passages))

    ranks = "1 process"
    if found.processes != 1:
        ranks = f"{found.processes} processes"

    subtitle = f"{prepared.base.source} · template: {prepared.template.source} · {ranks}"
    return Document("What will be trained", visible(subtitle), blocks)


def _figures(split: Split) -> Figures:
    summary = split.store.summary
    share = summary.num_targets / max(summary.num_tokens, 1)
    return Figures(
        [
            (f"{summary.num_rows:,}", "rows"),
            (f"{summary.num_samples:,}", "samples"),
            (f"{summary.num_tokens:,}", "tokens"),
            (f"{summary.num_targets:,}", f"targets ({share:.1%})"),
        ]
    )


def _notes(found: Inspection, clean: Clean) -> Iterator[Note]:
    """Yield the notes: problems first, then warnings, then what is right."""
    notes: list[Note] = []
    for split in found.splits:
        notes += _split_notes(split, found.prepared.tokenizer, clean)

    overlap = found.overlap
    if overlap is not None and overlap.count:
        text = f"{overlap.count:,} validation samples are trained on too, token by token"
        notes.append(Note("bad", text, list(map(clean, overlap.examples))))
    elif overlap is not None:
        notes.append(Note("good", "no validation sample is trained on"))

    if found.refusal is not None:
        yield Note("bad", visible(f"a training with these keys is refused: {found.refusal}"))
    if found.tokenizer_differs is not None:
        text = "because of model_type in config.json, transformers splits text in another way than tokenizer.json"
        notes.append(Note("warning", text, [clean(found.tokenizer_differs)]))

    for level in ("bad", "warning", "good"):
        yield from (note for note in notes if note.level == level)


def _split_notes(split: Split, tokenizer: Any, clean: Clean) -> Iterator[Note]:
    """Yield the notes about one of the two datasets."""
    name = split.name
    summary = split.store.summary
    for kind, (level, what) in LOST.items():
        losses = [loss for loss in split.losses if loss.kind == kind]
        if not losses:
            continue
        rows: set[tuple[str, int]] = set()
        rows.update(*(loss.rows for loss in losses))
        text = f"{name}: {rows_in_words(len(rows))} {what}"
        tokens = sum(loss.tokens for loss in losses)
        if tokens:
            text += f", {tokens:,} tokens of them not trained"
        if kind == "incomplete":
            parts = [summary.findings[name].count for name in IN_THE_LEDGER if name in summary.findings]
            text += f", {sum(parts):,} in all"
        yield Note(level, text)

    if not split.losses:
        yield Note("good", f"{name}: all of its {rows_in_words(summary.num_rows)} are trained, none is cut")

    yield from (Note("warning", clean(f"{name}: {finding}")) for finding in split.findings)
    yield _repeated(
        clean, split.duplicates, f"{name}: # samples repeat an earlier one", f"{name}: no sample occurs twice"
    )
    yield _repeated(
        clean,
        split.unstopped,
        f"{name}: # samples without a stop token: the model does not learn from them where a reply ends",
        f"{name}: every sample teaches a stop token, {_stops(split.store, tokenizer)}",
    )


def _repeated(clean: Clean, found: Found, text: str, otherwise: str) -> Note:
    if not found.count:
        return Note("good", otherwise)
    return Note("warning", text.replace("#", f"{found.count:,}"), list(map(clean, found.examples)))


def _stops(store: SampleStore, tokenizer: Any) -> str:
    return ", ".join(visible(str(tokenizer.convert_ids_to_tokens(token))) for token in store.summary.stop_tokens)


def _files(found: Inspection, folder: str) -> Table:
    header = ["file", "rows", "samples", "tokens", "targets", "of tokens", "rows not trained", "tokens lost"]
    rows: list[list[str]] = []
    totals = set()
    for split in found.splits:
        rows += [_counts(visible(file.file.removeprefix(folder)), file) for file in split.files]
        if len(split.files) > 1:
            totals.add(len(rows))
            rows.append(_counts(f"{split.name}, {len(split.files)} files", _sum(split.files)))

    note = "Every token of every rendered row is either trained or counted as lost."
    title = "Files"
    if folder:
        title = visible(f"Files in {folder}")
    return Table(title, header, rows, totals=frozenset(totals), note=note)


def _sources(found: Inspection) -> Iterator[Table]:
    rows: list[Any] = []
    for split, figures in found.prepared.sources.items():
        rows += source_rows(figures, split)
    if rows:
        yield Table("Sources", SOURCE_HEADER, rows, note="Shares of targets are those of an average epoch.")


def _common_folder(files: Sequence[str]) -> str:
    """Return the folder that all files are in, with its slash; empty when they are in several."""
    folders = {file[: file.rfind("/") + 1] for file in files}
    if len(folders) > 1:
        return ""
    return folders.pop()


def _sum(files: Sequence[FileCounts]) -> FileCounts:
    """Return the counts of all files together."""
    total = FileCounts("")
    for file in files:
        for name in ("rows", "rows_trained", "samples", "tokens", "targets", "tokens_lost", "targets_lost"):
            setattr(total, name, getattr(total, name) + getattr(file, name))
    return total


def _counts(name: str, file: FileCounts) -> list[str]:
    """Return a row of the table of files."""
    numbers = (file.rows, file.samples, file.tokens, file.targets)
    share = NONE
    if file.tokens:
        share = f"{file.targets / file.tokens:.1%}"
    losses = (file.rows - file.rows_trained, file.tokens_lost)
    return [name, *(f"{number:,}" for number in numbers), share, *(f"{loss:,}" if loss else NONE for loss in losses)]


def _lengths(split: Split, clean: Clean) -> Bars:
    lengths = split.store.lengths
    bars = []
    for low, high, number in histogram(lengths):
        label = f"{low:,}"
        if high > low:
            label += f"–{high:,}"
        bars.append((label, number))

    middle, most = np.percentile(lengths, [50, 95])
    note = f"Median {middle:,.0f} tokens, 95 % up to {most:,.0f}, longest {int(lengths.max()):,}"
    longest = clean(str(split.store.ref(int(np.argmax(lengths)))))
    return Bars(f"Lengths of the samples in tokens, {split.name}", bars, f"{note} ({longest}).")


def _facts(found: Inspection) -> list[tuple[str, str]]:
    """Return lines about the steps of a training, as (name, text)."""
    packing = found.packing
    spec = found.spec
    rows = steps_in_words(len(found.prepared.train), spec, found.schedule)
    ranks = f"{spec.dp_size:,}"
    if found.config.ulysses_sequence_parallel_size > 1:
        ranks += f" of {found.processes // spec.dp_size:,} processes each"

    rows += [
        ("data ranks", ranks),
        ("forwards a step", f"{packing.forwards_per_step:.4g} on each data rank"),
        ("samples a forward", f"{packing.samples_per_forward:.4g}"),
        ("tokens a forward", f"{packing.tokens_per_forward:,.0f}, at most {packing.most_tokens:,}"),
        ("padding", f"{packing.padding_ratio:.2%} of all tokens that are computed"),
        ("saved by packing", f"{packing.padded_ratio:.1%} of a batch that is padded to its longest sample"),
    ]
    if packing.fill_ratio is not None:
        cap = found.config.data.max_token_len_per_gpu
        rows.append(("filled", f"{packing.fill_ratio:.1%} of data.max_token_len_per_gpu={cap:,}"))
    if spec.dp_size > 1:
        rows.append(("imbalance", f"{packing.imbalance:.3f} (cost of the busiest data rank / mean)"))
    if packing.steps_seen < steps_per_epoch(len(found.prepared.train), spec):
        rows.append(("planned for this", f"{packing.steps_seen:,} steps, spread over the epoch"))
    return rows


def _losses(found: Inspection, clean: Clean) -> Table:
    header = ["", "what", "rows", "samples", "tokens lost", "targets lost", "why, and the first of them"]
    rows = []
    for split in found.splits:
        for loss in split.losses:
            numbers = (len(loss.rows), loss.samples, loss.tokens, loss.targets)
            rows.append([split.name, loss.kind, *(f"{number:,}" for number in numbers), clean(_why(loss))])

    note = "The run folder of a training holds every such row in rejected.jsonl."
    return Table("Not trained, or not completely", header, rows, words=frozenset({0, 1, 6}), note=note)


def _why(loss: Loss) -> str:
    """Return the reason, and the first rows."""
    separator = ", "
    if loss.kind == "incomplete":
        separator = "; "  # a row that is named with its turns holds commas

    text = f"{loss.reason}: {separator.join(loss.examples)}"
    if loss.found:
        text += f" ({loss.found})"
    return text


def sample_passage(
    store: SampleStore, pick: Pick, tokenizer: Any, clean: Clean = visible, whole: bool = False
) -> Passage:
    """Return one sample with its targets marked, or why a row has none. `whole`: in a terminal it is not shortened."""
    if pick.index is None:
        return Passage(clean(pick.title), clean(pick.why), ())

    sample = store[pick.index]
    length = len(sample.input_ids)
    targets = sample.num_targets
    noun = "turns"
    if len(sample.turns) == 1:
        noun = "turn"

    title = f"{sample.ref}, {noun} {', '.join(map(str, sample.turns))}"
    note = f"{length:,} tokens, {targets:,} of them targets ({targets / length:.0%}); {pick.why}"
    return Passage(clean(title), visible(note), list(_tokens(store, pick.index, tokenizer)), whole)


def _tokens(store: SampleStore, index: int, tokenizer: Any) -> Iterator[Token]:
    """Yield the tokens of a sample. Those that only together form a character are one."""
    sample = store[index]
    ids = sample.input_ids
    is_target = target_mask(sample)
    controls = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    controls |= set(tokenizer.get_added_vocab().values())
    first = 0
    for end in range(1, len(ids) + 1):
        text = decoded(tokenizer, ids, first, end)
        may_grow = end < len(ids) and is_target[end] == is_target[first] and end - first < MOST_TOKENS
        if may_grow and text.endswith("�"):
            continue
        token_ids = tuple(ids[first:end].tolist())
        yield Token(visible(text), token_ids, bool(is_target[first]), ids[first] in controls)
        first = end

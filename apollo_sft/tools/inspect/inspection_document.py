"""An inspection as a report: what stands in it, in which order and in which words."""

from __future__ import annotations

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
from apollo_sft.tools.inspect.inspection import Inspection, Pick, Split, rows_in_words
from apollo_sft.train.announce import steps_in_words

LOST: dict[str, tuple[Level, str]] = {
    "refused": ("bad", "refused"),
    "dropped": ("bad", "dropped"),
    "cut": ("bad", "cut"),
    "incomplete": ("bad", "with replies that the template does not write whole"),
    "left out": ("look", "with turns left out"),
    "set aside": ("look", "set aside"),
}
Clean = Callable[[str], str]
"""Makes a text harmless for a terminal, and leaves out the folder that all files are in."""
MOST_TOGETHER = 12
"""Tokens that make one character at most, before they are shown as they are."""


def document(found: Inspection, picks: Sequence[tuple[Split, Pick]], whole: bool, first: bool = False) -> Document:
    """`picks`: the samples to show. `whole`: in a terminal, too, nothing of them is shortened. `first`: show the first
    of them before all figures.
    """
    prepared = found.prepared
    folder = _common_folder([file.file for split in found.splits for file in split.files])

    def clean(text: str) -> str:
        return visible(text.replace(folder, "") if folder else text)

    passages = [sample_passage(split.store, pick, prepared.tokenizer, clean, whole) for split, pick in picks]
    blocks: list[Block] = [_figures(found.splits[0]), Notes("What was found", list(_notes(found, clean)))]
    if first:
        blocks.append(Passages("One of the samples", passages[:1]))
    blocks += [
        _files(found, folder),
        *_sources(found),
        _losses(found, clean),
        Facts("What a training would do", _facts(found)),
    ]
    blocks += [_lengths(split, clean) for split in found.splits]
    blocks.append(Passages("More samples" if first else "Samples", passages[first:]))
    ranks = f"{found.processes} {'process' if found.processes == 1 else 'processes'}"
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
    """What is wrong first, then what needs a look, then what is right."""
    notes = [note for split in found.splits for note in _split_notes(split, found.prepared.tokenizer, clean)]
    overlap = found.overlap
    if overlap is not None and overlap.count:
        text = f"{overlap.count:,} validation samples are trained on too, token by token"
        notes.append(Note("bad", text, list(map(clean, overlap.examples))))
    elif overlap is not None:
        notes.append(Note("good", "no validation sample is trained on"))
    if found.refusal is not None:
        yield Note("bad", visible(f"a training with these keys is refused: {found.refusal}"))
    if found.tokenizer_differs is not None:
        text = "transformers splits the text otherwise than tokenizer.json says, because of model_type in config.json"
        notes.append(Note("look", text, [clean(found.tokenizer_differs)]))
    for level in ("bad", "look", "good"):
        yield from (note for note in notes if note.level == level)


def _split_notes(split: Split, tokenizer: Any, clean: Clean) -> Iterator[Note]:
    name, summary = split.name, split.store.summary
    for kind, (level, what) in LOST.items():
        losses = [loss for loss in split.losses if loss.kind == kind]
        if losses:
            rows = {row for loss in losses for row in loss.rows}
            tokens = sum(loss.tokens for loss in losses)
            lost = f", {tokens:,} tokens of them not trained" if tokens else ""
            replies = f": {summary.findings['unwritten_turns'].count:,} replies" if kind == "incomplete" else ""
            yield Note(level, f"{name}: {rows_in_words(len(rows))} {what}{lost}{replies}")
    if not split.losses:
        yield Note("good", f"{name}: all of its {rows_in_words(summary.num_rows)} are trained, none is cut")
    yield from (Note("look", clean(f"{name}: {finding}")) for finding in split.findings)
    yield _repeated(
        clean, split.duplicates, f"{name}: # samples repeat an earlier one", f"{name}: no sample occurs twice"
    )
    yield _repeated(
        clean,
        split.unstopped,
        f"{name}: # samples without a stop token: nothing in them says where a reply ends",
        f"{name}: every sample teaches a stop token, {_stops(split.store, tokenizer)}",
    )


def _repeated(clean: Clean, found: Found, text: str, otherwise: str) -> Note:
    if not found.count:
        return Note("good", otherwise)
    return Note("look", text.replace("#", f"{found.count:,}"), list(map(clean, found.examples)))


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
    return Table(
        visible(f"Files in {folder}") if folder else "Files", header, rows, totals=frozenset(totals), note=note
    )


def _sources(found: Inspection) -> Iterator[Table]:
    rows = [row for split, of in found.prepared.sources.items() for row in source_rows(of, split)]
    if rows:
        yield Table("Sources", SOURCE_HEADER, rows, note="Shares of targets are those of an average epoch.")


def _common_folder(files: Sequence[str]) -> str:
    """The folder that all of them are in, with its slash."""
    folders = {file[: file.rfind("/") + 1] for file in files}
    return folders.pop() if len(folders) == 1 else ""


def _sum(files: Sequence[FileCounts]) -> FileCounts:
    names = ("rows", "rows_trained", "samples", "tokens", "targets", "tokens_lost", "targets_lost")
    return FileCounts("", *(sum(getattr(file, name) for file in files) for name in names))


def _counts(name: str, file: FileCounts) -> list[str]:
    share = f"{file.targets / file.tokens:.1%}" if file.tokens else "–"
    numbers = (file.rows, file.samples, file.tokens, file.targets)
    lost = (file.rows - file.rows_trained, file.tokens_lost)
    return [name, *(f"{number:,}" for number in numbers), share, *(f"{number:,}" if number else "–" for number in lost)]


def _lengths(split: Split, clean: Clean) -> Bars:
    lengths = split.store.lengths
    bars = [(f"{low:,}–{high:,}" if high > low else f"{low:,}", number) for low, high, number in histogram(lengths)]
    middle, most = np.percentile(lengths, [50, 95])
    note = f"Median {middle:,.0f} tokens, 95 % up to {most:,.0f}, longest {int(lengths.max()):,}"
    longest = clean(str(split.store.ref(int(np.argmax(lengths)))))
    return Bars(f"Lengths of the samples in tokens, {split.name}", bars, f"{note} ({longest}).")


def _facts(found: Inspection) -> list[tuple[str, str]]:
    data, packing, spec = found.config.data, found.packing, found.spec
    rows = steps_in_words(len(found.prepared.train), spec, found.schedule)
    ranks = f"{spec.dp_size:,}" + (f" of {found.processes // spec.dp_size:,} processes each" if _sp(found) > 1 else "")
    rows += [
        ("data ranks", ranks),
        ("forwards a step", f"{packing.forwards_per_step:.4g} on each data rank"),
        ("samples a forward", f"{packing.samples_per_forward:.4g}"),
        ("tokens a forward", f"{packing.tokens_per_forward:,.0f}, at most {packing.most_tokens:,}"),
        ("padding", f"{packing.padding_ratio:.2%} of all tokens that are computed"),
        ("saved by packing", f"{packing.padded_ratio:.1%} of a batch that is padded to its longest sample"),
    ]
    if packing.fill_ratio is not None:
        rows.append(
            ("filled", f"{packing.fill_ratio:.1%} of data.max_token_len_per_gpu={data.max_token_len_per_gpu:,}")
        )
    if spec.dp_size > 1:
        rows.append(("imbalance", f"{packing.imbalance:.3f} (cost of the busiest data rank / mean)"))
    if packing.steps_seen < steps_per_epoch(len(found.prepared.train), spec):
        rows.append(("planned for this", f"{packing.steps_seen:,} steps, spread over the epoch"))
    return rows


def _sp(found: Inspection) -> int:
    return found.config.ulysses_sequence_parallel_size


def _losses(found: Inspection, clean: Clean) -> Table:
    header = ["", "what", "rows", "samples", "tokens lost", "targets lost", "why, and the first of them"]
    rows = [
        [
            split.name,
            loss.kind,
            f"{len(loss.rows):,}",
            f"{loss.samples:,}",
            f"{loss.tokens:,}",
            f"{loss.targets:,}",
            clean(_why(loss)),
        ]
        for split in found.splits
        for loss in split.losses
    ]
    note = "The run folder of a training holds every such row in rejected.jsonl."
    return Table("Not trained, or not whole", header, rows, words=frozenset({0, 1, 6}), note=note)


def _why(loss: Loss) -> str:
    """The reason, and the first rows; a row that is named with its turns holds commas."""
    examples = ("; " if loss.kind == "incomplete" else ", ").join(loss.examples)
    return f"{loss.reason}: {examples}" + (f" ({loss.found})" if loss.found else "")


def sample_passage(
    store: SampleStore, pick: Pick, tokenizer: Any, clean: Clean = visible, whole: bool = False
) -> Passage:
    """One sample with its targets marked, or why a row has none. `whole`: in a terminal nothing of it is shortened."""
    if pick.index is None:
        return Passage(clean(pick.title), clean(pick.why), ())
    sample = store[pick.index]
    length, targets = len(sample.input_ids), sample.num_targets
    turns = f", {'turn' if len(sample.turns) == 1 else 'turns'} {', '.join(map(str, sample.turns))}"
    note = f"{length:,} tokens, {targets:,} of them targets ({targets / length:.0%}); {pick.why}"
    return Passage(clean(f"{sample.ref}{turns}"), visible(note), list(_tokens(store, pick.index, tokenizer)), whole)


def _tokens(store: SampleStore, index: int, tokenizer: Any) -> Iterator[Token]:
    sample = store[index]
    ids, is_target = sample.input_ids, target_mask(sample)
    controls = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    controls |= set(tokenizer.get_added_vocab().values())
    first = 0
    for end in range(1, len(ids) + 1):
        text = decoded(tokenizer, ids, first, end)
        goes_on = end < len(ids) and is_target[end] == is_target[first] and end - first < MOST_TOGETHER
        if goes_on and text.endswith("�"):
            continue
        together = tuple(ids[first:end].tolist())
        yield Token(visible(text), together, bool(is_target[first]), ids[first] in controls)
        first = end

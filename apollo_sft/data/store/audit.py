"""Describe what will be trained, for a person to read before a GPU is used."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import pairwise, product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from apollo_sft.data.store.store_files import SampleStore
from apollo_sft.data.store.summary import StoreSummary
from apollo_sft.types import IGNORE_INDEX, Sample

if TYPE_CHECKING:
    from apollo_sft.data.batch.mixture import Mixture

TARGET_START = "⟦"
TARGET_END = "⟧"
GREEN = "\033[32m"
DIM = "\033[2m"
RESET = "\033[0m"
CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")
CONTEXT_CHARS = 400
TARGET_CHARS = 1200

FINDINGS = {
    "lost_parts": "{count} parts of rows are neither trained nor in a prompt: the template does not write them, first "
    "{rows}",
    "reasoning_left_out": "the reasoning of {count} earlier replies is in no prompt: the template leaves it out, as at "
    "inference",
    "thinking_off": "{count} of {turns} replies have no reasoning and are trained as replies with thinking off: the "
    "empty block is part of the prompt (data.thinking=auto)",
    "clipped_marks": "{count} replies have generation tags around more than the model writes: only what it writes is "
    "trained",
    "blank_turns": "{count} replies are blank and have no stop token: they have no target",
    "expanded_rows": "{count} rows give several samples: the template rewrites earlier turns once others follow",
    "turns_left_out": "{count} turns are not trained: the template rewrites them once others follow "
    "(data.history=last_turn)",
    "rewritten_turns": "{count} turns are trained in a form the model never produces at inference "
    "(data.history=as_rendered)",
    "cut_turns": "{count} of {turns} replies would share a token with their prompt: they are tokenised separately, as "
    "at inference",
    "turns_without_stop": "{count} replies have no stop token: the model does not learn where to end them",
    "second_stops": "{count} replies end with two stop tokens, the second one the tokenizer's eos: both are trained",
    "unopened_turns": "{count} replies are trained without the opening (such as <think>) that the template appends to "
    "the prompt at inference",
    "unwritten_turns": "{count} replies are trained without content, reasoning or tool calls of their row: the "
    "template does not write them, first {rows}",
    "trained_headers": "{count} replies are trained with the role header before them: the template ignores "
    "add_generation_prompt, so the model has to write it, first {rows}",
    "unmarked_turns": "{count} turns are not trained: the template's generation tags leave them out",
    "control_tokens_dropped": "{count} rows are not trained: their text spells control tokens, first {rows}",
    "control_tokens": "{count} rows are trained although their text spells control tokens, first {rows}",
    "empty_replies": "{count} replies are empty",
    "unpredictable_targets": "{count} targets are at position 0: there is nothing before them to predict them from",
}
"""The findings of a renderer, in words."""


def describe(
    train: SampleStore,
    val: SampleStore | None,
    tokenizer: Any,
    plan: Sequence[tuple[str, str]] = (),
    colour: bool = False,
    sources: Sequence[Sequence[str]] = (),
) -> str:
    """Return a table of both datasets, remarks about what may be unexpected, and one example with its targets marked.

    `plan` are more lines of the table, as (name, value): steps per epoch and what else the caller knows. `sources`: the
    rows of `source_rows`.
    """
    stores = [("train", train)]
    if val is not None:
        stores.append(("validation", val))

    lines = _table([(name, store.summary) for name, store in stores], plan, tokenizer)
    for name, store in stores:
        lines += [f"  ! {name}: {remark}" for remark in remarks(store.summary)]
    if sources:
        lines += ["", *_aligned([SOURCE_HEADER, *sources])]

    # One example shows a wrong template or a wrong column at a glance, which no figure does.
    example = usual_sample(train)
    legend = f"{TARGET_START}{TARGET_END} = what is trained"
    lines += ["", f"Example ({train.ref(example)}), {legend}:", ""]
    lines.append(marked(train[example], tokenizer, colour))
    return "\n".join(lines)


def to_json(train: SampleStore, val: SampleStore | None, sources: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return the same figures for `data_audit.json`: the summary of each dataset, and the remarks about it.

    `sources`: what `source_figures` returns, for each dataset that has named sources.
    """
    stores = {"train": train}
    if val is not None:
        stores["validation"] = val

    audit = {}
    for name, store in stores.items():
        audit[name] = {"store": str(store.folder)} | store.summary.to_json() | {"remarks": remarks(store.summary)}
    for name, figures in (sources or {}).items():
        audit[name]["sources"] = figures
    return audit


def source_figures(store: SampleStore, sources: Mixture) -> dict[str, dict[str, float]]:
    """Return the size of each source, and what an epoch takes of it. Where that is not every sample once, an epoch's
    targets are those of as many average samples: which ones it takes changes from epoch to epoch.
    """
    tokens = sources.in_store(store.lengths)
    targets = sources.in_store(store.num_targets)
    figures: dict[str, dict[str, float]] = {}
    for name, size, take in zip(sources.names, sources.sizes, sources.takes, strict=True):
        figures[name] = {
            "num_samples": size,
            "num_tokens": tokens[name],
            "num_targets": targets[name],
            "samples_per_epoch": take,
            "times_per_epoch": take / size,
            "targets_per_epoch": targets[name] * take / size,
        }

    # Of targets, not of samples: they are what the loss is averaged over.
    total = sum(source["targets_per_epoch"] for source in figures.values())
    for source in figures.values():
        source["targets_ratio"] = source["targets_per_epoch"] / total
    return figures


SOURCE_HEADER = ("source", "samples", "tokens", "targets", "an epoch takes", "times", "of its targets")


def source_rows(figures: Mapping[str, Mapping[str, float]], split: str) -> list[list[str]]:
    """Return the rows under SOURCE_HEADER, from what `source_figures` returned. `split` precedes the names."""
    rows = []
    for name, source in figures.items():
        row = [
            f"{split}: {name}",
            f"{source['num_samples']:,.0f}",
            f"{source['num_tokens']:,.0f}",
            f"{source['num_targets']:,.0f}",
            f"{source['samples_per_epoch']:,.0f}",
            f"{source['times_per_epoch']:.4g}",
            f"{source['targets_ratio']:.1%}",
        ]
        rows.append(row)
    return rows


def write_ledger(train: SampleStore, val: SampleStore | None, path: Path) -> None:
    """Write every row that is not trained or not complete, one JSON line each."""
    with path.open("w", encoding="utf-8") as file:
        for split, store in (("train", train), ("validation", val)):
            if store is None:
                continue
            for entry in store.rejected():
                file.write(json.dumps({"split": split} | asdict(entry), ensure_ascii=False) + "\n")


def write_findings(train: SampleStore, val: SampleStore | None, path: Path) -> None:
    """Write what is said in rows and is neither trained nor in a prompt, one JSON line each; no file for nothing."""
    lines = []
    for split, store in (("train", train), ("validation", val)):
        entries = []
        if store is not None:
            entries = [entry for entry in store.rejected() if entry.unwritten]
        for entry in entries:
            for message, key in product(entry.turns or (None,), entry.keys):
                place = {"split": split, "file": entry.file, "row": entry.row, "message": message, "key": key}
                lines.append(json.dumps(place, ensure_ascii=False) + "\n")

    path.unlink(missing_ok=True)
    if lines:
        path.write_text("".join(lines), encoding="utf-8")


def marked(sample: Sample, tokenizer: Any, colour: bool = False) -> str:
    """Return the text of a sample with its targets between brackets; long stretches are shortened in the middle."""
    return "".join(_piece(text, is_target, colour) for text, is_target in stretches(sample, tokenizer))


def stretches(sample: Sample, tokenizer: Any) -> list[tuple[str, bool]]:
    """Return the whole text of a sample in stretches: (text, whether it is trained)."""
    ids = sample.input_ids
    is_target = target_mask(sample)
    changes = np.flatnonzero(np.diff(is_target)) + 1
    edges = [0, *changes.tolist(), len(is_target)]
    return [(decoded(tokenizer, ids, first, end), bool(is_target[first])) for first, end in pairwise(edges)]


def target_mask(sample: Sample) -> np.ndarray:
    """Return which tokens are predicted in training, bool of shape (tokens,)."""
    mask = np.zeros(len(sample.input_ids), dtype=bool)
    mask[1:] = sample.labels[:-1] != IGNORE_INDEX
    return mask


def decoded(tokenizer: Any, ids: np.ndarray, first: int, end: int) -> str:
    """Return the text of tokens [first, end) inside the sample.

    Some decoders treat the first token of a text in another way, so the token before is decoded too.
    """
    start = max(first - 1, 0)
    before: str = tokenizer.decode(ids[start:first].tolist(), clean_up_tokenization_spaces=False)
    both: str = tokenizer.decode(ids[start:end].tolist(), clean_up_tokenization_spaces=False)
    if both.startswith(before):
        return both[len(before) :]
    alone: str = tokenizer.decode(ids[first:end].tolist(), clean_up_tokenization_spaces=False)
    return alone


def visible(text: str) -> str:
    """Replace the characters that control a terminal: each is shown by its picture (␛) instead."""
    return CONTROLS.sub(_picture, text)


def remarks(summary: StoreSummary) -> list[str]:
    """Return what a user should know about the rows besides the table."""
    # Only what is not zero: a remark is there to be read.
    over = summary.over_max_length
    not_trained = summary.not_trained
    found = []
    if over.count:
        found.append(f"{over.count:,} rows over data.max_length, first {over.examples[0]}")
    if summary.tokens_cut:
        found.append(f"{summary.samples_truncated:,} samples truncated: {summary.tokens_cut:,} tokens cut")
    if summary.samples_not_trained:
        tokens = f"{summary.tokens_not_trained:,} tokens"
        found.append(f"{summary.samples_not_trained:,} samples with {tokens} not trained")
    if summary.targets_lost:
        found.append(f"{summary.targets_lost:,} targets cut or dropped in all")
    if not_trained.count:
        found.append(f"{not_trained.count:,} rows not trained, first {', '.join(not_trained.examples)}")
    return found + findings(summary)


def findings(summary: StoreSummary, without: frozenset[str] = frozenset()) -> list[str]:
    """Return what the renderer found, in words. `without`: names of FINDINGS that are left out."""
    texts = []
    for name, text in FINDINGS.items():
        tally = summary.findings.get(name)
        if tally is None or name in without:
            continue
        rows = ", ".join(tally.examples)
        texts.append(text.format(count=f"{tally.count:,}", turns=f"{summary.num_turns:,}", rows=rows))
    return texts


def usual_sample(store: SampleStore) -> int:
    """Return a sample of ordinary length that is trained on more than a stop token: the first one up to the median."""
    usual = (store.lengths <= np.median(store.lengths)) & (store.num_targets > 1)
    if not usual.any():
        return 0
    return int(np.argmax(usual))


def _picture(found: re.Match[str]) -> str:
    code = ord(found[0])
    if code < 0x20:
        return chr(0x2400 + code)
    return "\ufffd"


def _table(stores: list[tuple[str, StoreSummary]], plan: Sequence[tuple[str, str]], tokenizer: Any) -> list[str]:
    header = ["", *(name for name, _ in stores)]
    rows = [
        ["rows", *(f"{s.num_rows:,}" for _, s in stores)],
        ["samples", *(f"{s.num_samples:,}" for _, s in stores)],
        ["tokens", *(f"{s.num_tokens:,}" for _, s in stores)],
        ["targets", *(f"{s.num_targets:,} ({s.num_targets / max(s.num_tokens, 1):.1%})" for _, s in stores)],
        ["longest row", *(f"{s.longest_tokens:,} tokens" for _, s in stores)],
        ["stop tokens", *(_stops(s, tokenizer) for _, s in stores)],
    ]
    rows += [[name, value] + [""] * (len(stores) - 1) for name, value in plan]
    longest = [f"  longest of {name}: {s.longest_row}" for name, s in stores]
    return [*_aligned([header, *rows]), *longest]


def _aligned(table: Sequence[Sequence[str]]) -> list[str]:
    """Align the first column on the left, the others on the right."""
    columns = zip(*table, strict=True)
    widths = [max(map(len, column)) for column in columns]
    lines = []
    for row in table:
        cells = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join([row[0].ljust(widths[0]), *cells]).rstrip())
    return lines


def _stops(summary: StoreSummary, tokenizer: Any) -> str:
    names = [str(tokenizer.convert_ids_to_tokens(token)) for token in summary.stop_tokens]
    return ", ".join(names) or "none"


def _piece(text: str, is_target: bool, colour: bool) -> str:
    limit = TARGET_CHARS if is_target else CONTEXT_CHARS
    colour_code = GREEN if is_target else DIM
    if len(text) > limit:
        half = limit // 2
        text = f"{text[:half]} … {len(text) - 2 * half:,} characters … {text[-half:]}"

    # After shortening, so that no escape sequence of a row reaches the terminal.
    text = visible(text)
    if is_target:
        text = f"{TARGET_START}{text}{TARGET_END}"
    if not colour:
        return text
    return f"{colour_code}{text}{RESET}"

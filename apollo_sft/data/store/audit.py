"""What will be trained, as a person wants to read it before a GPU is used."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from apollo_sft.data.store.store_files import SampleStore, StoreSummary
from apollo_sft.types import IGNORE_INDEX, Sample

if TYPE_CHECKING:
    from apollo_sft.data.batch.mixture import Mixture

TARGET_START, TARGET_END = "⟦", "⟧"
GREEN, DIM, RESET = "\033[32m", "\033[2m", "\033[0m"
CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")
CONTEXT_CHARS = 400
TARGET_CHARS = 1200

FINDINGS = {
    "expanded_rows": "{count} rows give several samples: the template rewrites earlier turns once others follow",
    "turns_left_out": "{count} turns not trained (data.history): the template rewrites them once others follow",
    "rewritten_turns": "{count} turns trained as the template rewrites them, as no inference does (data.history)",
    "cut_turns": "{count} of {turns} replies would share a token with their prompt: tokenised apart, as at inference",
    "turns_without_stop": "{count} replies without a stop token: the model does not learn where to end them",
    "second_stops": "{count} replies end in two marks, the second of them the tokenizer's eos: both are trained",
    "unopened_turns": "{count} replies stand after the role header, without the opening (such as <think>) with which "
    "the template ends the prompt at inference: it writes none in a reply",
    "unwritten_turns": "{count} replies lose content, reasoning or tool calls: the template does not write them, "
    "first {rows}",
    "trained_headers": "{count} replies are trained with the role header before them: the template ignores "
    "add_generation_prompt, so it is the model that has to write it, first {rows}",
    "unmarked_turns": "{count} turns not trained: the template's generation tags leave them out",
    "control_tokens_dropped": "{count} rows not trained, their text spells control tokens, first {rows}",
    "control_tokens": "{count} rows whose text spells control tokens, trained as they are, first {rows}",
    "empty_replies": "{count} empty replies",
    "unpredictable_targets": "{count} targets at position 0, with nothing before them to predict them from",
}
"""What a renderer counts, in words."""


def describe(
    train: SampleStore,
    val: SampleStore | None,
    tokenizer: Any,
    plan: Sequence[tuple[str, str]] = (),
    colour: bool = False,
    sources: Sequence[Sequence[str]] = (),
) -> str:
    """A table of both datasets, remarks where something needs a look, and one example with its targets marked.

    `plan` are more lines of the table, as (name, value): steps per epoch and what else the caller knows. `sources`: the
    rows of `source_rows`.
    """
    stores = [("train", train)] + ([("validation", val)] if val is not None else [])
    lines = _table([(name, store.summary) for name, store in stores], plan, tokenizer)
    for name, store in stores:
        lines += [f"  ! {name}: {remark}" for remark in remarks(store.summary)]
    if sources:
        lines += ["", *_aligned([SOURCE_HEADER, *sources])]
    example = usual_sample(train)
    legend = f"{TARGET_START}{TARGET_END} = what is trained"
    lines += ["", f"Example ({train.ref(example)}), {legend}:", ""]
    lines.append(marked(train[example], tokenizer, colour))
    return "\n".join(lines)


def to_json(train: SampleStore, val: SampleStore | None, sources: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The same figures for `data_audit.json`: the summary of each dataset, and what is remarkable about it.

    `sources`: what `source_figures` gives of each dataset that has named sources.
    """
    stores = {"train": train} | ({"validation": val} if val is not None else {})
    audit = {
        name: {"store": str(store.folder)} | asdict(store.summary) | {"remarks": remarks(store.summary)}
        for name, store in stores.items()
    }
    for name, figures in (sources or {}).items():
        audit[name]["sources"] = figures
    return audit


def source_figures(store: SampleStore, sources: Mixture) -> dict[str, dict[str, float]]:
    """What each source has, and what an epoch takes of it. Where that is not every sample once, an epoch's targets are
    those of as many average samples: which ones it takes changes from epoch to epoch.
    """
    tokens, targets = sources.in_store(store.lengths), sources.in_store(store.num_targets)
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
    total = sum(of["targets_per_epoch"] for of in figures.values())
    for of in figures.values():
        of["targets_ratio"] = of["targets_per_epoch"] / total
    return figures


SOURCE_HEADER = ("source", "samples", "tokens", "targets", "an epoch takes", "times", "of its targets")


def source_rows(figures: Mapping[str, Mapping[str, float]], split: str) -> list[list[str]]:
    """Under SOURCE_HEADER, what `source_figures` found; `split` stands before the names."""
    return [
        [
            f"{split}: {name}",
            *(f"{of[key]:,.0f}" for key in ("num_samples", "num_tokens", "num_targets", "samples_per_epoch")),
            f"{of['times_per_epoch']:.4g}",
            f"{of['targets_ratio']:.1%}",
        ]
        for name, of in figures.items()
    ]


def write_ledger(train: SampleStore, val: SampleStore | None, path: Path) -> None:
    """Every row that is not trained or not whole, one JSON line each."""
    with path.open("w", encoding="utf-8") as file:
        for split, store in (("train", train), ("validation", val)):
            for entry in store.rejected() if store is not None else ():
                file.write(json.dumps({"split": split} | asdict(entry), ensure_ascii=False) + "\n")


def marked(sample: Sample, tokenizer: Any, colour: bool = False) -> str:
    """The text of a sample with its targets between brackets; long stretches are shortened in the middle."""
    return "".join(_piece(text, is_target, colour) for text, is_target in stretches(sample, tokenizer))


def stretches(sample: Sample, tokenizer: Any) -> list[tuple[str, bool]]:
    """The whole text of a sample in turn: (what is or is not trained, whether it is)."""
    ids, is_target = sample.input_ids, target_mask(sample)
    edges = [0, *(np.flatnonzero(np.diff(is_target)) + 1).tolist(), len(is_target)]
    return [(decoded(tokenizer, ids, first, end), bool(is_target[first])) for first, end in pairwise(edges)]


def target_mask(sample: Sample) -> np.ndarray:
    """Which tokens are predicted in training. Bool of shape (tokens,)."""
    mask = np.zeros(len(sample.input_ids), dtype=bool)
    mask[1:] = sample.labels[:-1] != IGNORE_INDEX
    return mask


def decoded(tokenizer: Any, ids: np.ndarray, first: int, end: int) -> str:
    """Tokens [first, end) as they stand in the text: some decoders treat the first token of a text in another way."""
    start = max(first - 1, 0)
    before: str = tokenizer.decode(ids[start:first].tolist(), clean_up_tokenization_spaces=False)
    both: str = tokenizer.decode(ids[start:end].tolist(), clean_up_tokenization_spaces=False)
    if both.startswith(before):
        return both[len(before) :]
    alone: str = tokenizer.decode(ids[first:end].tolist(), clean_up_tokenization_spaces=False)
    return alone


def visible(text: str) -> str:
    """Without characters that steer a terminal: each is shown by its picture (␛) instead."""
    return CONTROLS.sub(lambda found: chr(0x2400 + ord(found[0])) if ord(found[0]) < 0x20 else "\ufffd", text)


def remarks(summary: StoreSummary) -> list[str]:
    """What a user should know about the rows and did not ask for."""
    over, cut = summary.rows_over_max_length, summary.tokens_cut
    found = [
        (over, f"{over:,} rows over data.max_length, first {summary.first_over_max_length}"),
        (cut, f"{summary.samples_truncated:,} samples truncated: {cut:,} tokens cut"),
        (
            summary.samples_not_trained,
            f"{summary.samples_not_trained:,} samples with {summary.tokens_not_trained:,} tokens not trained",
        ),
        (summary.targets_lost, f"{summary.targets_lost:,} targets cut or dropped in all"),
        (
            summary.rows_not_trained,
            f"{summary.rows_not_trained:,} rows not trained, first {', '.join(summary.first_not_trained)}",
        ),
    ]
    return [text for count, text in found if count] + findings(summary)


def findings(summary: StoreSummary, without: frozenset[str] = frozenset()) -> list[str]:
    """What the renderer met, in words. `without`: names of FINDINGS that are not asked for."""
    texts = []
    for name, text in FINDINGS.items():
        if summary.found.get(name) and name not in without:
            rows = ", ".join(summary.first.get(name, []))
            texts.append(text.format(count=f"{summary.found[name]:,}", turns=f"{summary.num_turns:,}", rows=rows))
    return texts


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
    return [*_aligned([header, *rows]), *(f"  longest of {name}: {s.longest_row}" for name, s in stores)]


def _aligned(table: Sequence[Sequence[str]]) -> list[str]:
    """The first column on the left, the others on the right."""
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
    lines = []
    for row in table:
        cells = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join([row[0].ljust(widths[0]), *cells]).rstrip())
    return lines


def _stops(summary: StoreSummary, tokenizer: Any) -> str:
    names = [str(tokenizer.convert_ids_to_tokens(token)) for token in summary.stop_tokens]
    return ", ".join(names) or "none"


def usual_sample(store: SampleStore) -> int:
    """A sample of ordinary length that is trained on more than a stop token: the first one up to the median."""
    usual = (store.lengths <= np.median(store.lengths)) & (store.num_targets > 1)
    return int(np.argmax(usual)) if usual.any() else 0


def _piece(text: str, is_target: bool, colour: bool) -> str:
    limit = TARGET_CHARS if is_target else CONTEXT_CHARS
    if len(text) > limit:
        half = limit // 2
        text = f"{text[:half]} … {len(text) - 2 * half:,} characters … {text[-half:]}"
    text = visible(text)
    if is_target:
        text = f"{TARGET_START}{text}{TARGET_END}"
    if not colour:
        return text
    return f"{GREEN if is_target else DIM}{text}{RESET}"

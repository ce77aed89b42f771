"""Prepare the data of a training as the training does, and count them for `inspect`. No weight is read."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from apollo_sft.config.schema import DataConfig, SftConfig
from apollo_sft.config.values import with_values
from apollo_sft.data.batch.plan import PlanSpec, steps_per_epoch
from apollo_sft.data.store.audit import findings, stretches, usual_sample
from apollo_sft.data.store.store_files import Rejected, SampleStore
from apollo_sft.errors import ConfigError, DataError
from apollo_sft.parallel.mesh import Mesh, check_mesh
from apollo_sft.report.log import setup_logging
from apollo_sft.tools.inspect import counts as count
from apollo_sft.tools.inspect.counts import FileCounts, Found, Loss, Packing, Scan
from apollo_sft.train.loaders import plan_spec
from apollo_sft.train.optim.build import Schedule, schedule_of
from apollo_sft.train.prepare_run import Prepared, prepare
from apollo_sft.train.process import load_external_lib
from apollo_sft.types import RowRef, Sample

COMPARED = 8
"""Samples on which the tokenizer is compared with its file."""
PROBLEMS = {
    "refused": "refused",
    "dropped": "dropped",
    "cut": "cut",
    "incomplete": "with something that the template does not write",
}
"""Kinds of losses that make a check fail, in words."""
IN_THE_LEDGER = frozenset({"unwritten_turns", "lost_parts"})
"""Findings that the losses contain too, row by row."""
SHOWN = 2
"""Samples of each kind that `worst` returns."""


@dataclass(frozen=True, slots=True)
class Split:
    """One of the two datasets and what was found in it."""

    name: str
    store: SampleStore
    files: list[FileCounts]
    losses: list[Loss]
    duplicates: Found
    unstopped: Found

    findings: list[str]
    """What the renderer found, in words."""


@dataclass(frozen=True, slots=True)
class Inspection:
    """The data of a training, and all that was found in them."""

    config: SftConfig
    prepared: Prepared
    processes: int
    spec: PlanSpec
    schedule: Schedule
    packing: Packing
    splits: list[Split]
    overlap: Found | None

    refusal: str | None
    """The error with which a training with these keys would stop. The rows that it names are left out here."""

    tokenizer_differs: str | None

    @property
    def problems(self) -> list[str]:
        """Return why a check fails: rows that are not trained completely, or that are validated on and trained."""
        found = []
        for split in self.splits:
            for kind, words in PROBLEMS.items():
                rows: set[tuple[str, int]] = set()
                rows.update(*(loss.rows for loss in split.losses if loss.kind == kind))
                if rows:
                    found.append(f"{split.name}: {rows_in_words(len(rows))} {words}")
            if split.unstopped.count:
                found.append(f"{split.name}: {split.unstopped.count:,} samples without a stop token")

        if self.overlap is not None and self.overlap.count:
            found.append(f"{self.overlap.count:,} validation samples are trained on too")
        return found


def rows_in_words(number: int) -> str:
    """Return `1 row`, `2 rows`."""
    if number == 1:
        return "1 row"
    return f"{number:,} rows"


def inspect_data(config: SftConfig, processes: int | None) -> Inspection:
    """Prepare and count. `processes`: of the training; None: those of the config, or those that it needs.

    Raises: ConfigError, DataError, ModelError, TopologyError as a training, but not for single rows: they are counted,
    and named in `refusal`.
    """
    sp_size = config.ulysses_sequence_parallel_size
    trainer = config.trainer
    processes = processes or (trainer.n_gpus_per_node or 0) * trainer.nnodes or sp_size
    check_mesh(processes, sp_size, config.model.fsdp_config.fsdp_size)

    setup_logging(is_main=True)
    load_external_lib(config.model.external_lib)
    prepared, refusal = _prepare(config)
    mesh = Mesh(0, processes // sp_size, 0, sp_size, None)
    spec = plan_spec(config.data, trainer.seed, mesh, prepared.hf_config, prepared.train_sources)
    schedule = schedule_of(config.trainer, config.optim, steps_per_epoch(len(prepared.train), spec))

    train_scan = count.scan(prepared.train)
    splits = [_split("train", prepared.train, train_scan, config.data.truncation)]
    overlap = None
    if prepared.val is not None:
        val_scan = count.scan(prepared.val)
        splits.append(_split("validation", prepared.val, val_scan, config.data.truncation))
        overlap = count.overlap(prepared.train, train_scan.digests, prepared.val, val_scan.digests)

    differs = _tokenizer_differs(prepared)
    packing = count.packing(prepared.train.lengths, spec, sp_size)
    return Inspection(config, prepared, processes, spec, schedule, packing, splits, overlap, refusal, differs)


def _split(name: str, store: SampleStore, scan: Scan, truncation: str) -> Split:
    """Count one of the two datasets."""
    return Split(
        name=name,
        store=store,
        files=count.count_files(store),
        losses=_losses(store, truncation),
        duplicates=count.duplicates(store, scan.digests),
        unstopped=scan.unstopped,
        findings=findings(store.summary, without=IN_THE_LEDGER),
    )


def _tokenizer_differs(prepared: Prepared) -> str | None:
    """Return where tokenizer.json alone splits a sample in another way than the tokenizer of transformers; else None.

    For some kinds of model transformers replaces parts of the file's tokenizer by its own.
    """
    path = prepared.base.folder / "tokenizer.json"
    if not path.is_file():
        return None

    alone = Tokenizer.from_file(str(path))
    for index in range(min(len(prepared.train), COMPARED)):
        text = "".join(text for text, _ in stretches(prepared.train[index], prepared.tokenizer))
        expected = alone.encode(text, add_special_tokens=False).tokens
        found = prepared.tokenizer(text, add_special_tokens=False).tokens()
        at = next((i for i, pair in enumerate(zip(found, expected, strict=False)) if pair[0] != pair[1]), None)
        if at is not None:
            return f"{' '.join(found[at : at + 4])} instead of {' '.join(expected[at : at + 4])}"

    return None


def _prepare(config: SftConfig) -> tuple[Prepared, str | None]:
    """Prepare as a training does; where it refuses rows, without them: only then all of them can be named."""
    try:
        return prepare(config, weights=False), None
    except DataError as error:
        # Only values that refuse rows are changed; an error about anything else comes again.
        lenient = with_values(config, _lenient(config.data))
        if lenient == config:
            raise
        refusal = error

    try:
        return prepare(lenient, weights=False), str(refusal)
    except DataError:  # no row is left
        raise refusal from None


def _lenient(data: DataConfig) -> dict[str, Any]:
    """Return the keys with which no row is refused."""
    changes: dict[str, Any] = {"data.bad_rows": "skip", "data.max_bad_ratio": 1.0}
    if data.truncation == "error":
        changes["data.truncation"] = "drop"
    return changes


def _losses(store: SampleStore, truncation: str) -> list[Loss]:
    """Read the ledger. Long rows that only the inspection drops are refused by a training."""
    found = count.losses(store.rejected())
    if truncation == "error":
        for loss in found:
            if "data.truncation=drop" in loss.reason:
                loss.kind = "refused"
                loss.reason = loss.reason.replace("truncation=drop", "truncation=error")

    return found


@dataclass(frozen=True, slots=True)
class Pick:
    """A sample to show and why."""

    index: int | None
    """The sample; None for a row without one: then `why` gives the reason."""

    why: str
    title: str = ""


def usual(store: SampleStore) -> list[Pick]:
    """Return a sample of usual length and share of targets."""
    return _noted(store, [Pick(usual_sample(store), "a usual one")])


def worst(store: SampleStore) -> list[Pick]:
    """Return the longest samples, those with the least share of targets, and the first that are cut or incomplete."""
    longest = np.argsort(-store.lengths, kind="stable")[:SHOWN]
    least = np.argsort(store.num_targets / store.lengths, kind="stable")[:SHOWN]
    picks = [Pick(int(index), "among the longest") for index in longest]
    picks += [Pick(int(index), "among the least share of targets") for index in least]
    for kind in ("cut", "incomplete"):
        entries = (entry for entry in store.rejected() if count.kind_of(entry) == kind)
        for entry in islice(entries, SHOWN):
            of_entry = (i for i in _samples_of(store, entry.file, entry.row) if set(store[i].turns) & set(entry.turns))
            picks += [Pick(index, entry.reason) for index in islice(of_entry, 1)]

    return _merged(picks)


def at_random(store: SampleStore, number: int, seed: int) -> list[Pick]:
    """Return samples drawn at random."""
    chosen = np.random.default_rng(seed).permutation(len(store))[:number]
    return _noted(store, [Pick(int(index), f"drawn with --seed {seed}") for index in np.sort(chosen)])


def of_row(store: SampleStore, place: str) -> list[Pick]:
    """Return every sample of one row, and what of it is not trained. `place`: `12`, or `FILE:12`, the end of a path.

    Raises: ConfigError.
    """
    name, _, number = place.rpartition(":")
    files = [file for file in store.summary.files if file.endswith(name)]
    if not number.isdecimal() or not files:
        raise ConfigError(
            f"--row {place}: no such row",
            expected="a number from 0, or FILE:NUMBER with one of " + ", ".join(store.summary.files),
        )

    row = int(number)
    entries = [entry for entry in store.rejected() if (entry.file, entry.row) == (files[0], row)]
    picks = [
        Pick(index, "; ".join(_reasons(store[index], entries)) or "complete")
        for index in _samples_of(store, files[0], row)
    ]
    picks += [Pick(None, f"not trained: {e.reason}", f"{files[0]} row {row}") for e in entries if not e.trained]
    if not picks:
        raise ConfigError(f"--row {place}: no such row", found=files[0], fix="--row FILE:NUMBER for another file")
    return picks


def _noted(store: SampleStore, picks: list[Pick]) -> list[Pick]:
    """Return the picks with the reasons that the ledger gives for each."""
    refs = {store.ref(pick.index) for pick in picks if pick.index is not None}
    entries = [entry for entry in store.rejected() if RowRef(entry.file, entry.row) in refs]
    noted = []
    for pick in picks:
        assert pick.index is not None, "only rows that the user names may have no sample"
        noted.append(replace(pick, why="; ".join([pick.why, *_reasons(store[pick.index], entries)])))

    return noted


def _reasons(sample: Sample, entries: Iterable[Rejected]) -> Iterator[str]:
    """Yield why a sample is not complete."""
    for entry in entries:
        turns = [turn for turn in entry.turns if turn in sample.turns]
        if not (entry.trained and turns and RowRef(entry.file, entry.row) == sample.ref):
            continue
        if entry.unwritten:
            yield f"turn {', '.join(map(str, turns))}: {entry.reason}"
        else:
            yield entry.reason


def _samples_of(store: SampleStore, file: str, row: int) -> list[int]:
    source = store.summary.files.index(file)
    found: list[int] = np.flatnonzero((store.sources == source) & (store.rows == row)).tolist()
    return found


def _merged(picks: list[Pick]) -> list[Pick]:
    """Return each sample once, with all its reasons."""
    found: dict[int | None, list[str]] = {}
    for pick in picks:
        found.setdefault(pick.index, []).append(pick.why)
    return [Pick(index, "; ".join(reasons)) for index, reasons in found.items()]

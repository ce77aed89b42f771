"""One run, or several beside one another, as a report: what stands in it, in which order and in which words."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from apollo_sft.report.console import clock
from apollo_sft.report.curves import SMOOTHED_FROM, number
from apollo_sft.report.document import (
    Block,
    Curve,
    Document,
    Facts,
    Figures,
    Note,
    Notes,
    Passages,
    Plot,
    Plots,
    Replies,
    Reply,
    Table,
)
from apollo_sft.report.run_files import LostRows, RunRecord

GIB = 2.0**-30
SHOWN_REASONS = 12
SHOWN_REPLIES = 8
LONGEST_VALUE = 2000
WORSE = 1.02
"""The last validation loss over the best, from which on it is worth a remark."""
MEASURES = (
    ("Learning rate", "train/lr", 1.0, ""),
    ("Gradient norm", "train/grad_norm", 1.0, "before clipping"),
    ("Throughput", "train/tokens_per_second", 1.0, "tokens per second, all processes"),
    ("Memory", "memory/peak_bytes", GIB, "GiB, the most of one process so far"),
    ("Model FLOPs utilization", "perf/mfu", 100.0, "% of the peak"),
    ("Waiting for data", "perf/data_wait_seconds", 1.0, "seconds of a step"),
)
"""(title, metric, scale, unit). One that no run has measured is left out."""
MAY_BE_LOGARITHMIC = frozenset({"train/grad_norm"})
SMOOTH = frozenset({"train/lr", "memory/peak_bytes"})
STATUS = {
    "running": ("look", "the run has not ended: this is how far it had come, or it was killed"),
    "failed": ("bad", "the run failed"),
    "refused": ("bad", "the run was refused before it trained"),
    "preempted": ("look", "the run was stopped by a signal, with its state saved: the same command goes on"),
}


def document(runs: Sequence[RunRecord], trained: Passages | None = None) -> Document:
    """`trained`: samples of the one run."""
    if len(runs) > 1:
        return _comparison(runs)
    [run] = runs
    blocks: list[Block] = [_figures(run), Notes("What to know", list(_notes(run))), _plots(runs)]
    blocks += [_replies(run, "What the model said at validations"), _audit(runs), *_sources(runs)]
    blocks += [_lost(run.lost)]
    blocks += [trained] if trained is not None else []
    blocks += [_settings(run, "Configuration"), *_stages(run), _surroundings(run)]
    return Document(str(run.config.get("trainer.experiment_name", run.name)), _subtitle(run), blocks)


def _comparison(runs: Sequence[RunRecord]) -> Document:
    blocks: list[Block] = [_results(runs), _differences(runs), _plots(runs)]
    blocks += [_replies(run, f"What the model of {run.name} said") for run in runs]
    blocks += [_audit(runs), *_sources(runs), *(_settings(run, f"Configuration of {run.name}") for run in runs)]
    return Document(f"{len(runs)} runs", " · ".join(run.name for run in runs), blocks)


def _subtitle(run: RunRecord) -> str:
    processes = run.facts.get("processes", 1)
    where = f"{processes} {'process' if processes == 1 else 'processes'} on {run.facts.get('device', '?')}"
    base = str(run.config.get("model.partial_pretrain") or "")
    model = Path(base).name if Path(base).is_absolute() or base.startswith("~") else base  # the whole path stands below
    began = str(run.facts.get("started") or "").replace("T", " ", 1)
    parts = [model, run.facts.get("status"), began, where]
    return " · ".join([*(str(part) for part in parts if part), str(run.folder)])


def _figures(run: RunRecord) -> Figures:
    items = [
        (f"{_steps(run):,}", "steps"),
        (number(run.total("train/tokens")), "tokens"),
        (clock(run.total("train/step_seconds")), "training time"),
    ]
    validations = run.series("val/loss")
    if validations:
        step, loss = min(validations, key=lambda point: point[1])
        items += [(f"{validations[-1][1]:.4f}", "last validation loss")]
        items += [(f"{loss:.4f}", f"best validation loss, step {step:,}")]
    elif run.series("train/loss"):
        items += [(f"{run.series('train/loss')[-1][1]:.4f}", "last training loss")]
    return Figures(items, chain=False)


def _steps(run: RunRecord) -> int:
    return max((int(record["step"]) for record in run.metrics), default=0)


def _notes(run: RunRecord) -> Iterator[Note]:
    level, text = STATUS.get(str(run.facts.get("status")), ("good", "the run is finished"))
    stage = run.facts.get("stage")
    yield Note(level, f"{text}, while {stage}" if stage else text)  # type: ignore[arg-type]
    validations = run.series("val/loss")
    if validations:
        step, best = min(validations, key=lambda point: point[1])
        last = validations[-1][1]
        if last > WORSE * best:
            yield Note("look", f"validation loss has risen from {best:.4f} at step {step:,} to {last:.4f}")
        else:
            is_best = f"{last:.4f}" == f"{best:.4f}"
            more = ", the best of the run" if is_best else f"; the best is {best:.4f}, at step {step:,}"
            yield Note("good", f"validation loss ends at {last:.4f}{more}")
    waits, seconds = run.total("perf/data_wait_seconds"), run.total("train/step_seconds")
    if waits > 0.05 * seconds > 0:
        yield Note("look", f"{waits / seconds:.0%} of the training time was waiting for data")
    for split, figures in run.audit.items():
        yield from (Note("look", f"{split}: {remark}") for remark in figures.get("remarks", ()))


def _plots(runs: Sequence[RunRecord]) -> Plots:
    several = len(runs) > 1
    losses: list[Curve] = []
    for index, run in enumerate(runs):
        first = f"{run.name} · " if several else ""
        losses.append(Curve(f"{first}training", run.series("train/loss"), index))
        if run.series("val/loss"):
            losses.append(Curve(f"{first}validation", run.series("val/loss"), index if several else 1, sparse=True))
    plots = [Plot("Loss", losses, "mean over targets", may_be_log=True), *_source_plots(runs)]
    for title, metric, scale, unit in MEASURES:
        if any(run.series(metric) for run in runs):
            curves = [Curve(run.name, run.series(metric, scale), index) for index, run in enumerate(runs)]
            is_log = metric in MAY_BE_LOGARITHMIC
            plots.append(Plot(title, curves, unit, not is_log, is_log, noisy=metric not in SMOOTH))
    is_smoothed = any(len(run.series("train/loss")) >= SMOOTHED_FROM for run in runs)
    smoothing = "The faint line is every step, the strong one a moving mean. " if is_smoothed else ""
    return Plots("Curves", plots, f"From left to right: steps. {smoothing}The pointer shows what was measured.")


def _source_plots(runs: Sequence[RunRecord]) -> Iterator[Plot]:
    """The losses of each source and of each validation set, where they have names."""
    for title, split in (("Loss of each source", "train"), ("Validation loss of each set", "val")):
        curves: list[Curve] = []
        for run in runs:
            for name in run.sources(split):
                label = f"{run.name} · {name}" if len(runs) > 1 else name
                points = run.series(f"{split}/{name}/loss")
                curves.append(Curve(label, points, len(curves), sparse=split == "val"))
        if curves:
            yield Plot(title, curves, "mean over its targets", may_be_log=True)


def _sources(runs: Sequence[RunRecord]) -> Iterator[Table]:
    """What an epoch takes of each source."""
    header = ["source", "samples", "tokens", "targets", "an epoch takes", "times", "of its targets"]
    several = len(runs) > 1
    rows = [
        [
            f"{run.name} · {split}: {name}" if several else f"{split}: {name}",
            *(f"{of[key]:,.0f}" for key in ("num_samples", "num_tokens", "num_targets", "samples_per_epoch")),
            f"{of['times_per_epoch']:.4g}",
            f"{of['targets_ratio']:.1%}",
        ]
        for run in runs
        for split, figures in run.audit.items()
        for name, of in (figures.get("sources") or {}).items()
    ]
    if rows:
        yield Table("Sources", header, rows, note="Shares of targets are those of an average epoch.")


def _replies(run: RunRecord, title: str) -> Replies:
    """Row by row, the latest first."""
    rows: dict[str, list[dict[str, Any]]] = {}
    for sample in run.samples:
        rows.setdefault(str(sample["row"]), []).append(sample)
    replies = []
    for of_row in list(rows.values())[:SHOWN_REPLIES]:
        said = [(f"step {sample['step']:,}", _ended(sample)) for sample in reversed(of_row)]
        replies.append(Reply(str(of_row[0]["prompt"]), str(of_row[0]["expected"]), said))
    return Replies(title, replies, "Greedy, from the prompt as it was trained; … where it was cut off.")


def _ended(sample: dict[str, Any]) -> str:
    return str(sample["text"]) + ("" if sample.get("stopped", True) else " …")


def _audit(runs: Sequence[RunRecord]) -> Table:
    """One line a dataset; of several runs with the same data, once."""
    rows: list[list[str]] = []
    for run in runs:
        for split, figures in run.audit.items():
            name = f"{run.name} · {split}" if len(runs) > 1 else split
            rows.append([name, *_counts(figures)])
    if len(runs) > 1 and all(run.audit == runs[0].audit for run in runs):
        rows = [[split, *_counts(figures)] for split, figures in runs[0].audit.items()]
    header = ["data", "rows", "samples", "tokens", "targets", "of tokens", "longest", "rows not trained", "tokens cut"]
    return Table("What was trained on", header, rows)


def _counts(figures: dict[str, Any]) -> list[str]:
    tokens, targets = int(figures.get("num_tokens", 0)), int(figures.get("num_targets", 0))
    lost = [int(figures.get(name) or 0) for name in ("rows_not_trained", "tokens_cut")]
    return [
        *(f"{int(figures.get(name, 0)):,}" for name in ("num_rows", "num_samples")),
        f"{tokens:,}",
        f"{targets:,}",
        f"{targets / tokens:.1%}" if tokens else "–",
        f"{int(figures.get('longest_tokens') or 0):,}",
        *(f"{count:,}" if count else "–" for count in lost),
    ]


def _lost(lost: Sequence[LostRows]) -> Table:
    rows = [
        [
            entry.split,
            "not whole" if entry.trained else "not trained",
            f"{entry.entries:,}",
            f"{entry.tokens:,}",
            f"{entry.reason}: {', '.join(entry.examples)}",
        ]
        for entry in lost[:SHOWN_REASONS]
    ]
    more = f", {len(lost) - SHOWN_REASONS} more reasons" if len(lost) > SHOWN_REASONS else ""
    header = ["data", "what", "samples", "tokens lost", "why, and the first of them"]
    note = f"rejected.jsonl in the run folder names every one{more}."
    return Table("Not trained, or not whole", header, rows, words=frozenset({0, 1, 4}), note=note)


def _settings(run: RunRecord, title: str) -> Facts:
    """What was set, and folded up all the rest."""
    given = run.facts.get("overridden") or {}
    rest = [(key, _value(value)) for key, value in run.config.items() if not _is_below(key, given)]
    return Facts(title, [(key, _value(value)) for key, value in given.items()], f"{len(rest)} keys at defaults", rest)


def _is_below(key: str, given: dict[str, Any]) -> bool:
    return any(f"{key}.".startswith(f"{name}.") for name in given)


def _stages(run: RunRecord) -> list[Block]:
    """List the stages of the last start with their times; nothing for a run of a version that did not record them."""
    seconds = run.facts.get("stages") or {}
    if not seconds:
        return []
    return [Facts("Where the time went, in the last start", [(name, clock(value)) for name, value in seconds.items()])]


def _surroundings(run: RunRecord) -> Facts:
    versions = [(str(name), str(version)) for name, version in (run.facts.get("versions") or {}).items()]
    rows = [(name, str(run.facts[name])) for name in ("host", "started", "finished") if run.facts.get(name)]
    command = " ".join(str(word) for word in run.facts.get("command") or ())
    return Facts("Where it ran", [*rows, *versions, ("command", command)])


def _results(runs: Sequence[RunRecord]) -> Table:
    header = ["run", "status", "steps", "tokens", "time", "tokens/s", "training loss", "last validation", "best", "at"]
    rows = []
    for run in runs:
        losses, validations = run.series("train/loss"), run.series("val/loss")
        best = min(validations, key=lambda point: point[1]) if validations else None
        seconds, tokens = run.total("train/step_seconds"), run.total("train/tokens")
        rows.append(
            [
                run.name,
                str(run.facts.get("status", "?")),
                f"{_steps(run):,}",
                number(tokens),
                clock(seconds),
                f"{tokens / seconds:,.0f}" if seconds else "–",
                f"{losses[-1][1]:.4f}" if losses else "–",
                f"{validations[-1][1]:.4f}" if validations else "–",
                f"{best[1]:.4f}" if best else "–",
                f"step {best[0]:,}" if best else "–",
            ]
        )
    return Table("How they ended", header, rows, words=frozenset({0, 1}))


def _differences(runs: Sequence[RunRecord]) -> Table:
    """Keys, processes and versions that are not the same everywhere."""
    known = [run.config | _outside(run) for run in runs]
    keys = list(dict.fromkeys(key for facts in known for key in facts))
    rows = [[key, *(_value(facts.get(key, "–")) for facts in known)] for key in keys]
    rows = [row for row in rows if len(set(row[1:])) > 1]
    columns = frozenset(range(len(runs) + 1))
    note = "All else is the same. –: the version of that run did not know the key."
    return Table("What differs", ["key", *(run.name for run in runs)], rows, words=columns, note=note)


def _outside(run: RunRecord) -> dict[str, Any]:
    versions = {f"version of {name}": version for name, version in (run.facts.get("versions") or {}).items()}
    return {name: run.facts[name] for name in ("processes", "device", "host") if name in run.facts} | versions


def _value(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(_value, value))}]"
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    text = re.sub(r"(?<=\d)e-0(?=\d)", "e-", text) if isinstance(value, float) else text
    return text if len(text) <= LONGEST_VALUE else f"{text[:LONGEST_VALUE]} … ({len(text):,} characters)"

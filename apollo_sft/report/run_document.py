"""The content of the report of one run, or of several runs side by side."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
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
NONE = "–"
"""Shown where there is no number."""
SOURCE_HEADER = ("source", "samples", "tokens", "targets", "an epoch takes", "times", "of its targets")
WORSE = 1.02
"""Ratio of the last validation loss to the best one from which on the report has a warning."""
MEASURES = (
    ("Learning rate", "train/lr", 1.0, ""),
    ("Gradient norm", "train/grad_norm", 1.0, "before clipping"),
    ("Throughput", "train/tokens_per_second", 1.0, "tokens per second, all processes"),
    ("Memory", "memory/peak_bytes", GIB, "GiB, the most of one process so far"),
    ("Model FLOPs utilization", "perf/mfu", 100.0, "% of the peak"),
    ("Waiting for data", "perf/data_wait_seconds", 1.0, "seconds of a step"),
)
"""(title, metric, scale, unit). A metric that no run has measured is left out."""
MAY_BE_LOGARITHMIC = frozenset({"train/grad_norm"})
SMOOTH = frozenset({"train/lr", "memory/peak_bytes"})
STATUS = {
    "running": ("warning", "the run has not ended, or it was killed: these are the steps so far"),
    "failed": ("bad", "the run failed"),
    "refused": ("bad", "the run was refused before it trained"),
    "preempted": ("warning", "the run was stopped by a signal, with its state saved: the same command resumes it"),
}


def document(runs: Sequence[RunRecord], trained: Passages | None = None) -> Document:
    """Build the report of one run, or the comparison of several. `trained`: samples of the one run."""
    if len(runs) > 1:
        return _comparison(runs)

    [run] = runs
    blocks: list[Block] = [_figures(run), Notes("What to know", list(_notes(run))), _plots(runs)]
    blocks += [_replies(run, "Replies of the model at validations"), _audit(runs), *_sources(runs)]
    blocks.append(_lost(run.lost))
    if trained is not None:
        blocks.append(trained)

    blocks += [_settings(run, "Configuration"), *_stages(run), _surroundings(run)]
    return Document(str(run.config.get("trainer.experiment_name", run.name)), _subtitle(run), blocks)


def _comparison(runs: Sequence[RunRecord]) -> Document:
    blocks: list[Block] = [_results(runs), _differences(runs), _plots(runs)]
    blocks += [_replies(run, f"Replies of the model of {run.name}") for run in runs]
    blocks += [_audit(runs), *_sources(runs), *(_settings(run, f"Configuration of {run.name}") for run in runs)]
    return Document(f"{len(runs)} runs", " · ".join(run.name for run in runs), blocks)


def _subtitle(run: RunRecord) -> str:
    processes = run.facts.get("processes", 1)
    noun = "process" if processes == 1 else "processes"
    where = f"{processes} {noun} on {run.facts.get('device', '?')}"

    # The name of a local folder is enough here: its path is among the settings below.
    model = str(run.config.get("model.partial_pretrain") or "")
    if Path(model).is_absolute() or model.startswith("~"):
        model = Path(model).name

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
        step, loss = _best(validations)
        items.append((f"{validations[-1][1]:.4f}", "last validation loss"))
        items.append((f"{loss:.4f}", f"best validation loss, step {step:,}"))
    elif run.series("train/loss"):
        items.append((f"{run.series('train/loss')[-1][1]:.4f}", "last training loss"))

    return Figures(items, chain=False)


def _best(validations: Sequence[tuple[int, float]]) -> tuple[int, float]:
    """Return the (step, loss) of the lowest loss."""
    return min(validations, key=lambda point: point[1])


def _steps(run: RunRecord) -> int:
    return max((int(record["step"]) for record in run.metrics), default=0)


def _notes(run: RunRecord) -> Iterator[Note]:
    level, text = STATUS.get(str(run.facts.get("status")), ("good", "the run is finished"))
    stage = run.facts.get("stage")
    if stage:
        text += f", while {stage}"

    yield Note(level, text)  # type: ignore[arg-type]

    validations = run.series("val/loss")
    if validations:
        yield _validation_note(validations)

    waits = run.total("perf/data_wait_seconds")
    seconds = run.total("train/step_seconds")
    if waits > 0.05 * seconds > 0:
        yield Note("warning", f"{waits / seconds:.0%} of the training time was waiting for data")

    for split, figures in run.audit.items():
        for remark in figures.get("remarks", ()):
            yield Note("warning", f"{split}: {remark}")


def _validation_note(validations: Sequence[tuple[int, float]]) -> Note:
    step, best = _best(validations)
    last = validations[-1][1]
    if last > WORSE * best:
        return Note("warning", f"validation loss has risen from {best:.4f} at step {step:,} to {last:.4f}")

    text = f"validation loss ends at {last:.4f}"
    # Compared as they are printed: "0.5000; the best is 0.5000" would puzzle a reader.
    if f"{last:.4f}" == f"{best:.4f}":
        return Note("good", f"{text}, the best of the run")
    return Note("good", f"{text}; the best is {best:.4f}, at step {step:,}")


def _label(runs: Sequence[RunRecord], run: RunRecord, name: str) -> str:
    """Return the name of a part of a run, with the name of the run where there are several."""
    return f"{run.name} · {name}" if len(runs) > 1 else name


def _plots(runs: Sequence[RunRecord]) -> Plots:
    several = len(runs) > 1
    losses: list[Curve] = []
    for index, run in enumerate(runs):
        losses.append(Curve(_label(runs, run, "training"), run.series("train/loss"), index))
        if run.series("val/loss"):
            # A colour is that of a run; with one run, its two curves have two colours.
            colour = index if several else 1
            losses.append(Curve(_label(runs, run, "validation"), run.series("val/loss"), colour, sparse=True))

    plots = [Plot("Loss", losses, "mean over targets", may_be_log=True), *_source_plots(runs)]
    for title, metric, scale, unit in MEASURES:
        if any(run.series(metric) for run in runs):
            curves = [Curve(run.name, run.series(metric, scale), index) for index, run in enumerate(runs)]
            is_log = metric in MAY_BE_LOGARITHMIC
            plots.append(Plot(title, curves, unit, not is_log, is_log, noisy=metric not in SMOOTH))

    smoothing = ""
    if any(len(run.series("train/loss")) >= SMOOTHED_FROM for run in runs):
        smoothing = "The faint line is every step, the strong one a moving mean. "

    return Plots("Curves", plots, f"From left to right: steps. {smoothing}The pointer shows what was measured.")


def _source_plots(runs: Sequence[RunRecord]) -> Iterator[Plot]:
    """Plot the losses of each source and of each validation set, where they have names."""
    for title, split in (("Loss of each source", "train"), ("Validation loss of each set", "val")):
        curves: list[Curve] = []
        for run in runs:
            for name in run.sources(split):
                points = run.series(f"{split}/{name}/loss")
                curves.append(Curve(_label(runs, run, name), points, len(curves), sparse=split == "val"))
        if curves:
            yield Plot(title, curves, "mean over its targets", may_be_log=True)


def _sources(runs: Sequence[RunRecord]) -> Iterator[Table]:
    """Make a table of what an epoch takes of each source; nothing when no run has named sources."""
    rows: list[list[str]] = []
    for run in runs:
        for split, audit in run.audit.items():
            sources = audit.get("sources") or {}
            rows += [_source_row(_label(runs, run, f"{split}: {name}"), of) for name, of in sources.items()]

    if rows:
        yield Table("Sources", SOURCE_HEADER, rows, note="Shares of targets are those of an average epoch.")


def _source_row(name: str, of: Mapping[str, float]) -> list[str]:
    counts = ("num_samples", "num_tokens", "num_targets", "samples_per_epoch")
    return [
        name,
        *(f"{of[key]:,.0f}" for key in counts),
        f"{of['times_per_epoch']:.4g}",
        f"{of['targets_ratio']:.1%}",
    ]


def _replies(run: RunRecord, title: str) -> Replies:
    """Group the replies by prompt, the latest first."""
    rows: dict[str, list[dict[str, Any]]] = {}
    for sample in run.samples:
        rows.setdefault(str(sample["row"]), []).append(sample)

    replies = []
    for of_row in list(rows.values())[:SHOWN_REPLIES]:
        texts = [(f"step {sample['step']:,}", _reply_text(sample)) for sample in reversed(of_row)]
        replies.append(Reply(str(of_row[0]["prompt"]), str(of_row[0]["expected"]), texts))
    return Replies(title, replies, "Greedy, from the prompt as it was trained; … where it was cut off.")


def _reply_text(sample: dict[str, Any]) -> str:
    text = str(sample["text"])
    if not sample.get("stopped", True):
        text += " …"
    return text


def _audit(runs: Sequence[RunRecord]) -> Table:
    """Make a table with one line per dataset; several runs with the same data share their lines."""
    rows: list[list[str]] = []
    for run in runs:
        for split, figures in run.audit.items():
            rows.append([_label(runs, run, split), *_counts(figures)])

    if len(runs) > 1 and all(run.audit == runs[0].audit for run in runs):
        rows = [[split, *_counts(figures)] for split, figures in runs[0].audit.items()]

    header = ["data", "rows", "samples", "tokens", "targets", "of tokens", "longest", "rows not trained", "tokens cut"]
    return Table("What was trained on", header, rows)


def _counts(figures: dict[str, Any]) -> list[str]:
    tokens = int(figures.get("num_tokens", 0))
    targets = int(figures.get("num_targets", 0))
    ratio = NONE
    if tokens:
        ratio = f"{targets / tokens:.1%}"

    return [
        *(f"{int(figures.get(name, 0)):,}" for name in ("num_rows", "num_samples")),
        f"{tokens:,}",
        f"{targets:,}",
        ratio,
        f"{int(figures.get('longest_tokens') or 0):,}",
        *(_count_or_dash(figures.get(name)) for name in ("rows_not_trained", "tokens_cut")),
    ]


def _count_or_dash(count: Any) -> str:
    return f"{int(count):,}" if count else NONE


def _lost(lost: Sequence[LostRows]) -> Table:
    rows = []
    for entry in lost[:SHOWN_REASONS]:
        what = "not whole" if entry.trained else "not trained"
        why = f"{entry.reason}: {', '.join(entry.examples)}"
        rows.append([entry.split, what, f"{entry.entries:,}", f"{entry.tokens:,}", why])

    more = ""
    if len(lost) > SHOWN_REASONS:
        more = f", {len(lost) - SHOWN_REASONS} more reasons"

    header = ["data", "what", "samples", "tokens lost", "why, and the first of them"]
    note = f"rejected.jsonl in the run folder names every one{more}."
    return Table("Not trained, or not whole", header, rows, words=frozenset({0, 1, 4}), note=note)


def _settings(run: RunRecord, title: str) -> Facts:
    """List the keys that were set, with the rest collapsed."""
    given = run.facts.get("overridden") or {}
    rest = [(key, _value(value)) for key, value in run.config.items() if not _is_below(key, given)]
    return Facts(title, [(key, _value(value)) for key, value in given.items()], f"{len(rest)} keys at defaults", rest)


def _is_below(key: str, given: dict[str, Any]) -> bool:
    """Return whether a key, or a section that it is in, was set."""
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
    return Table("How they ended", header, [_result(run) for run in runs], words=frozenset({0, 1}))


def _result(run: RunRecord) -> list[str]:
    seconds = run.total("train/step_seconds")
    tokens = run.total("train/tokens")
    rate = NONE
    if seconds:
        rate = f"{tokens / seconds:,.0f}"

    losses = run.series("train/loss")
    loss = NONE
    if losses:
        loss = f"{losses[-1][1]:.4f}"

    validation = [NONE, NONE, NONE]
    validations = run.series("val/loss")
    if validations:
        step, best = _best(validations)
        validation = [f"{validations[-1][1]:.4f}", f"{best:.4f}", f"step {step:,}"]

    status = str(run.facts.get("status", "?"))
    return [run.name, status, f"{_steps(run):,}", number(tokens), clock(seconds), rate, loss, *validation]


def _differences(runs: Sequence[RunRecord]) -> Table:
    """Make a table of the keys, processes and versions that are not the same everywhere."""
    known = [run.config | _outside(run) for run in runs]
    keys: dict[str, None] = {}
    for facts in known:
        keys.update(dict.fromkeys(facts))

    rows = [[key, *(_value(facts.get(key, "–")) for facts in known)] for key in keys]
    rows = [row for row in rows if len(set(row[1:])) > 1]
    columns = frozenset(range(len(runs) + 1))
    note = "Everything else is the same. –: the version of that run did not have the key."
    return Table("What differs", ["key", *(run.name for run in runs)], rows, words=columns, note=note)


def _outside(run: RunRecord) -> dict[str, Any]:
    versions = {f"version of {name}": version for name, version in (run.facts.get("versions") or {}).items()}
    return {name: run.facts[name] for name in ("processes", "device", "host") if name in run.facts} | versions


def _value(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(_value, value))}]"

    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    if isinstance(value, float):
        text = re.sub(r"(?<=\d)e-0(?=\d)", "e-", text)  # 2e-05, as Python writes it, as 2e-5

    if len(text) > LONGEST_VALUE:
        text = f"{text[:LONGEST_VALUE]} … ({len(text):,} characters)"
    return text

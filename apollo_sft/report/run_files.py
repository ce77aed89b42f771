"""What a run folder tells of its run: read back, whatever state the run is in."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from apollo_sft.config.overrides import leaves
from apollo_sft.errors import CheckpointError, ConfigError
from apollo_sft.report.metrics import Record, losses_by_name, read_metrics

NUMBERS = re.compile(r"\d[\d,]*")
MOST_NAMED = 3


@dataclass(slots=True)
class LostRows:
    """Rows of one split that are not trained, or not whole, for one reason."""

    split: str
    trained: bool
    reason: str
    entries: int = 0
    tokens: int = 0
    examples: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class RunRecord:
    """`facts`: run.json. `config`: dotted key -> value. `audit`: split -> figures. `samples`: lines of samples.jsonl.

    What a folder does not hold is empty.
    """

    folder: Path
    name: str
    facts: dict[str, Any]
    metrics: list[Record]
    config: dict[str, Any]
    audit: dict[str, Any]
    lost: list[LostRows]
    samples: list[dict[str, Any]]

    def series(self, name: str, scale: float = 1.0) -> list[tuple[int, float]]:
        """(step, value) of one metric."""
        return [(int(record["step"]), record[name] * scale) for record in self.metrics if name in record]

    def sources(self, split: str) -> list[str]:
        """Names of what has a loss of its own: sources of `train`, sets of `val`."""
        return list(dict.fromkeys(name for record in self.metrics for name in losses_by_name(record, split)))

    def total(self, name: str) -> float:
        return sum(record.get(name, 0) for record in self.metrics)


def read_runs(folders: Sequence[Path]) -> list[RunRecord]:
    """Raises: ConfigError for what is no run folder, CheckpointError for a file that cannot be read."""
    absolute = [folder.expanduser().absolute() for folder in folders]
    return [_read(folder, name) for folder, name in zip(absolute, _names(absolute), strict=True)]


def _read(folder: Path, name: str) -> RunRecord:
    if not (folder / "run.json").is_file():
        raise ConfigError(
            f"{folder} is not the folder of a run",
            found="no run.json in it" if folder.is_dir() else "no such folder",
            expected="trainer.default_local_dir of a training",
        )
    try:
        config = yaml.safe_load(_text(folder / "config.yaml")) or {}
        return RunRecord(
            folder=folder,
            name=name,
            facts=json.loads(_text(folder / "run.json")),
            metrics=_metrics(folder / "metrics.jsonl"),
            config=dict(leaves(config)),
            audit=json.loads(_text(folder / "data_audit.json") or "{}"),
            lost=_lost(folder / "rejected.jsonl"),
            samples=list(_lines(folder / "samples.jsonl")),
        )
    except (ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError) as error:
        found = str(error).splitlines()[0]
        raise CheckpointError(f"{folder} holds a file that is not what a run writes", found=found) from error
    except OSError as error:
        raise CheckpointError(f"{error.filename} cannot be read", found=error.strerror) from error


def _metrics(path: Path) -> list[Record]:
    """Raises: ValueError for lines that are no records."""
    records = read_metrics(path) if path.is_file() else []
    if not all(isinstance(record, dict) and "step" in record for record in records):
        raise ValueError(f"{path.name} has a line that is no step")
    return records


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """Whole lines only: the run may be writing the last one."""
    if path.is_file():
        with path.open(encoding="utf-8") as file:
            yield from (json.loads(line) for line in file if line.endswith("\n"))


def _lost(path: Path) -> list[LostRows]:
    """The most frequent reason first. Reasons that differ in numbers only are one."""
    found: dict[tuple[str, bool, str], LostRows] = {}
    for entry in _lines(path):
        split, trained, reason = str(entry["split"]), bool(entry["trained"]), str(entry["reason"])
        lost = found.setdefault((split, trained, NUMBERS.sub("…", reason)), LostRows(split, trained, reason))
        lost.entries += 1
        lost.tokens += int(entry.get("tokens_lost", 0))
        if len(lost.examples) < MOST_NAMED:
            lost.examples.append(f"{entry['file']} row {entry['row']}")
    return sorted(found.values(), key=lambda lost: -lost.entries)


def _names(folders: Sequence[Path]) -> list[str]:
    """The ends of the paths, as long as is needed to tell them apart."""
    for depth in range(1, max((len(folder.parts) for folder in folders), default=1) + 1):
        names = ["/".join(folder.parts[-depth:]) for folder in folders]
        if len(set(names)) == len(set(folders)):
            return names
    return names

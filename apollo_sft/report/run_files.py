"""Read back the records in a run folder, in whatever state the run is."""

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
    """The records of one run. A field is empty when the folder has no such file."""

    folder: Path
    name: str
    facts: dict[str, Any]
    """run.json."""
    metrics: list[Record]
    config: dict[str, Any]
    """The values of config.yaml by dotted key."""
    audit: dict[str, Any]
    """data_audit.json: figures by split."""
    lost: list[LostRows]
    samples: list[dict[str, Any]]
    """The lines of samples.jsonl."""

    def series(self, name: str, scale: float = 1.0) -> list[tuple[int, float]]:
        """Return (step, value) of one metric."""
        return [(int(record["step"]), record[name] * scale) for record in self.metrics if name in record]

    def sources(self, split: str) -> list[str]:
        """Return the names that have a loss of their own: sources of `train`, sets of `val`."""
        names: dict[str, None] = {}
        for record in self.metrics:
            names.update(dict.fromkeys(losses_by_name(record, split)))
        return list(names)

    def total(self, name: str) -> float:
        """Return the sum of one metric over all steps."""
        return sum(record.get(name, 0) for record in self.metrics)


def read_runs(folders: Sequence[Path]) -> list[RunRecord]:
    """Read run folders. Raises: ConfigError for what is no run folder, CheckpointError for a file that is damaged."""
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
    """Read metrics.jsonl. Raises: ValueError for lines that are no records."""
    if not path.is_file():
        return []
    records = read_metrics(path)
    if not all(isinstance(record, dict) and "step" in record for record in records):
        raise ValueError(f"{path.name} has a line that is no step")
    return records


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the complete lines only: the run may be writing the last one."""
    if not path.is_file():
        return
    with path.open(encoding="utf-8") as file:
        for line in file:
            if line.endswith("\n"):
                yield json.loads(line)


def _lost(path: Path) -> list[LostRows]:
    """Group the entries of rejected.jsonl by reason, the most frequent first."""
    found: dict[tuple[str, bool, str], LostRows] = {}
    for entry in _lines(path):
        new = LostRows(str(entry["split"]), bool(entry["trained"]), str(entry["reason"]))
        # Reasons that differ in their numbers only ("4,200 tokens", "5,100 tokens") are one.
        lost = found.setdefault((new.split, new.trained, NUMBERS.sub("…", new.reason)), new)
        lost.entries += 1
        lost.tokens += int(entry.get("tokens_lost", 0))
        if len(lost.examples) < MOST_NAMED:
            lost.examples.append(f"{entry['file']} row {entry['row']}")
    return sorted(found.values(), key=lambda lost: -lost.entries)


def _names(folders: Sequence[Path]) -> list[str]:
    """Return the ends of the paths, as long as is needed to make them differ."""
    deepest = max((len(folder.parts) for folder in folders), default=1)
    for depth in range(1, deepest + 1):
        names = ["/".join(folder.parts[-depth:]) for folder in folders]
        if len(set(names)) == len(set(folders)):
            return names
    return names

"""The names of all metrics, and metrics.jsonl, which always holds all of them: one JSON object per line."""

from __future__ import annotations

import json
import math
import os
import resource
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apollo_sft.errors import TrainingError

Record = dict[str, float | int]


@dataclass(frozen=True, slots=True)
class StepFacts:
    """Measurements of one step. Counts are over all ranks."""

    step: int
    loss: float
    """Token mean of the global batch."""
    grad_norm: float
    """Before clipping."""
    lr: float
    """The rate that this step used."""
    targets: int
    tokens: int
    step_seconds: float
    epoch: float
    """2.0 after two complete epochs."""
    peak_bytes: int
    data_wait_seconds: float = 0.0
    mfu: float | None = None
    """The model's operations divided by what the processors could have done in that time; None where not known."""


def train_record(facts: StepFacts) -> Record:
    """Build the record of one training step, under the names that every logger uses."""
    record: Record = {
        "step": facts.step,
        "train/loss": facts.loss,
        "train/grad_norm": facts.grad_norm,
        "train/lr": facts.lr,
        "train/targets": facts.targets,
        "train/tokens": facts.tokens,
        "train/tokens_per_second": facts.tokens / facts.step_seconds,
        "train/step_seconds": facts.step_seconds,
        "train/epoch": facts.epoch,
        "memory/peak_bytes": facts.peak_bytes,
        "perf/data_wait_seconds": facts.data_wait_seconds,
    }
    if facts.mfu is not None:
        record["perf/mfu"] = facts.mfu

    return record


def val_record(loss: float, targets: int) -> Record:
    """Build what a validation adds to a record. `loss`: token mean over the whole validation data."""
    return {"val/loss": loss, "val/targets": targets}


def source_record(split: str, sums: Iterable[float], targets: Mapping[str, int]) -> Record:
    """Build what each source of the data adds to a record, `train/NAME/loss` and so on: its mean over its own targets.

    `sums`: the loss sums, `targets`: their numbers by name. A source without a target in a step has no loss there.
    """
    record: Record = {}
    for (name, number), loss_sum in zip(targets.items(), sums, strict=True):
        if number:
            record[f"{split}/{name}/loss"] = loss_sum / number
        record[f"{split}/{name}/targets"] = number
    return record


def losses_by_name(record: Mapping[str, float], split: str) -> dict[str, float]:
    """Return the loss of each source in a record of `source_record`."""
    return _by_name(record, split, "loss")


def targets_by_name(record: Mapping[str, float], split: str) -> dict[str, int]:
    """Return the number of targets of each source in a record of `source_record`."""
    return {name: int(value) for name, value in _by_name(record, split, "targets").items()}


def _by_name(record: Mapping[str, float], split: str, what: str) -> dict[str, float]:
    parts = {key: key.split("/") for key in record if key.startswith(f"{split}/")}
    return {part[1]: record[key] for key, part in parts.items() if part[2:] == [what]}


def peak_bytes(device: Any) -> int:
    """Return the peak of PyTorch's allocator on a CUDA device, elsewhere the peak resident size of the process."""
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device)
    return peak_resident_bytes()


def peak_resident_bytes() -> int:
    """Return the peak resident size of this process, in bytes."""
    # Not `ru_maxrss` on Linux: it survives `execve` (getrusage(2)), so it starts at the size of the parent process.
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
        return int(status.split("VmHWM:")[1].split()[0]) * 1024
    except FileNotFoundError:
        pass

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if sys.platform == "darwin":  # counted in bytes there, in KiB elsewhere
        return peak
    return peak * 1024


class LineWriter:
    """Append JSON objects with a `step` to a file, line by line, each in the file before `write` returns.

    When the file is opened, an incomplete last line of an earlier crash is removed, and so are the steps after
    `first_step`, the number of steps done: they will be done again.
    """

    def __init__(self, path: Path, first_step: int = 0) -> None:
        _cut_broken_line(path)
        _cut_after(path, first_step)
        self._file = path.open("a", encoding="utf-8")

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one record. Raises: TrainingError when the file cannot be written."""
        try:
            self._file.write(json.dumps(record, allow_nan=False, ensure_ascii=False) + "\n")
            self._file.flush()
        except OSError as error:
            raise TrainingError(f"{self._file.name} cannot be written", found=error.strerror) from error

    def close(self) -> None:
        """Make all lines survive a power loss, and close the file."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()


class MetricsWriter(LineWriter):
    """Write metrics.jsonl."""

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one record of finite numbers."""
        assert all(math.isfinite(value) for value in record.values()), f"not finite: {record}"
        super().write(record)


def read_metrics(path: Path) -> list[Record]:
    """Read all complete lines of a metrics.jsonl, in order; a last line without its end is left out."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


def _cut_broken_line(path: Path) -> None:
    if not path.exists():
        return
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        os.truncate(path, whole)


def _cut_after(path: Path, first_step: int) -> None:
    if not path.exists():
        return

    kept = [record for record in read_metrics(path) if int(record["step"]) <= first_step]
    if first_step == 0:
        kept = []  # a run from the start repeats step 0 too, the validation before the first step

    text = "".join(json.dumps(record, allow_nan=False, ensure_ascii=False) + "\n" for record in kept)

    if text.encode() != path.read_bytes():
        shorter = path.with_name(f".apollo-{path.name}.tmp")
        shorter.write_text(text, encoding="utf-8")
        shorter.replace(path)

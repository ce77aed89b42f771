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
    """What is known of one step. Counts are over all ranks; `loss` is the token mean of the global batch.

    `grad_norm` is taken before clipping, `lr` is the rate this step used, `epoch` is 2.0 after two whole epochs.
    `mfu`: the model's operations over what the processors could have done in that time; None where that is not known.
    """

    step: int
    loss: float
    grad_norm: float
    lr: float
    targets: int
    tokens: int
    step_seconds: float
    epoch: float
    peak_bytes: int
    data_wait_seconds: float = 0.0
    mfu: float | None = None


def train_record(facts: StepFacts) -> Record:
    """The line of one training step, under the names that every logger uses."""
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
    return record if facts.mfu is None else record | {"perf/mfu": facts.mfu}


def val_record(loss: float, targets: int) -> Record:
    """What a validation adds to a line. `loss`: token mean over the whole validation data."""
    return {"val/loss": loss, "val/targets": targets}


def source_record(split: str, sums: Iterable[float], targets: Mapping[str, int]) -> Record:
    """What is known of each source of the data, `train/NAME/loss` and so on: the token mean over its own targets.

    `sums`: the loss sums, `targets`: their numbers by name. A source without a target in a step has no loss there.
    """
    record: Record = {}
    for (name, number), loss_sum in zip(targets.items(), sums, strict=True):
        record |= {f"{split}/{name}/loss": loss_sum / number} if number else {}
        record[f"{split}/{name}/targets"] = number
    return record


def losses_by_name(record: Mapping[str, float], split: str) -> dict[str, float]:
    """The loss of each source in a line: what `source_record` put there."""
    return _by_name(record, split, "loss")


def targets_by_name(record: Mapping[str, float], split: str) -> dict[str, int]:
    """The same of their targets."""
    return {name: int(value) for name, value in _by_name(record, split, "targets").items()}


def _by_name(record: Mapping[str, float], split: str, what: str) -> dict[str, float]:
    parts = {key: key.split("/") for key in record if key.startswith(f"{split}/")}
    return {part[1]: record[key] for key, part in parts.items() if part[2:] == [what]}


def peak_bytes(device: Any) -> int:
    """Peak of what PyTorch's allocator held on a CUDA device; elsewhere the peak resident size of the process."""
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device)
    return peak_resident_bytes()


def peak_resident_bytes() -> int:
    """Peak resident size of this process, in bytes.

    Linux's `VmHWM`: `ru_maxrss` starts at the size of the process that started this one (getrusage(2): it outlives
    `execve`). Where there is no `/proc`, `ru_maxrss`, which macOS counts in bytes.
    """
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    except FileNotFoundError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


class LineWriter:
    """Appends JSON objects with a `step` to a file, line by line, each in the file before `write` returns.

    A last line that an earlier crash left without its end is cut off when the file is opened, and so are the steps
    after `first_step`, the number of steps done: they will be done again.
    """

    def __init__(self, path: Path, first_step: int = 0) -> None:
        _cut_broken_line(path)
        _cut_after(path, first_step)
        self._file = path.open("a", encoding="utf-8")

    def write(self, record: Mapping[str, Any]) -> None:
        try:
            self._file.write(json.dumps(record, allow_nan=False, ensure_ascii=False) + "\n")
            self._file.flush()
        except OSError as error:
            raise TrainingError(f"{self._file.name} cannot be written", found=error.strerror) from error

    def close(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()


class MetricsWriter(LineWriter):
    """metrics.jsonl."""

    def write(self, record: Mapping[str, Any]) -> None:
        assert all(math.isfinite(value) for value in record.values()), f"not finite: {record}"
        super().write(record)


def read_metrics(path: Path) -> list[Record]:
    """All whole lines of a metrics.jsonl, in order; a last line without its end is left out."""
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
    text = "".join(json.dumps(record, allow_nan=False, ensure_ascii=False) + "\n" for record in kept if first_step)
    if text.encode() != path.read_bytes():
        shorter = path.with_name(f".apollo-{path.name}.tmp")
        shorter.write_text(text, encoding="utf-8")
        shorter.replace(path)

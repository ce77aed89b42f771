"""One record a step: to metrics.jsonl, to every logger, and to the person who watches. Silent off rank 0."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from apollo_sft.checkpoint.run_folder.folder import RunFolder
from apollo_sft.config.schema import TrainerConfig
from apollo_sft.report.console import Console
from apollo_sft.report.metrics import LineWriter, MetricsWriter, Record, read_metrics, targets_by_name
from apollo_sft.report.sinks import RunInfo, Sinks


class Reporter:
    """Writes the records of a run. Off rank 0 it is made with `info=None` and does nothing.

    Its counts are of the whole run, earlier starts too. `last_step`: the number of steps of the run.

    metrics.jsonl gets every record. The loggers get every `log_freq`-th step, the first, the last, and validations.
    """

    def __init__(self, trainer: TrainerConfig, info: RunInfo | None, last_step: int) -> None:
        self.validations: list[Record] = []
        self.steps = 0
        self.tokens = 0
        self.seconds = 0.0
        self.source_targets: Counter[str] = Counter()
        self._log_freq = trainer.log_freq
        self._last_step = last_step
        self._writer: MetricsWriter | None = None
        self._replies: LineWriter | None = None
        self._sinks: Sinks | None = None
        if info is not None:
            # The writer first: it removes the records of steps that this start trains again.
            self._writer = MetricsWriter(info.folder / "metrics.jsonl", info.first_step)
            for record in read_metrics(info.folder / "metrics.jsonl"):
                self._count(record)
            if trainer.generate_samples:
                self._replies = LineWriter(info.folder / "samples.jsonl", info.first_step)
            self._sinks = Sinks(trainer.logger, info)
        shows = info is not None and "console" in trainer.logger
        self._console = Console(last_step, trainer.log_freq, enabled=shows)

    def record(self, record: Record) -> None:
        """Write a record down, and hand it to the loggers when it is their turn."""
        if self._writer is None or self._sinks is None:
            return
        self._writer.write(record)
        self._count(record)
        step = int(record["step"])
        if step % self._log_freq == 0 or step in (1, self._last_step) or "val/loss" in record:
            self._sinks.log(record)
        self._console.step(record)

    def _count(self, record: Record) -> None:
        if "val/loss" in record:
            self.validations.append(record)
        if "train/loss" in record:
            self.steps += 1
            self.tokens += int(record["train/tokens"])
            self.source_targets.update(targets_by_name(record, "train"))
            self.seconds += float(record["train/step_seconds"])

    def replies(self, step: int, replies: Sequence[Mapping[str, Any]]) -> None:
        """Write the model's replies after `step` steps to samples.jsonl and to loggers that take text."""
        if self._replies is None or self._sinks is None or not replies:
            return
        for reply in replies:
            self._replies.write({"step": step} | dict(reply))
        self._sinks.replies(step, replies)

    def close(self) -> None:
        """Close the files and the loggers."""
        if self._writer is None or self._sinks is None:
            return
        if self._replies is not None:
            self._replies.close()
        self._console.close()
        self._sinks.close()
        self._writer.close()

    def __enter__(self) -> Reporter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_reporter(
    trainer: TrainerConfig, facts: dict[str, Any], folder: RunFolder | None, last_step: int, first_step: int
) -> Reporter:
    """Open the reporter of a run. `folder`: None off rank 0. `first_step`: the number of steps done before.

    `facts`: the config as loggers get it.
    """
    if folder is None:
        return Reporter(trainer, None, last_step)
    info = RunInfo(folder.root, trainer.project_name, trainer.experiment_name, facts, first_step)
    return Reporter(trainer, info, last_step)

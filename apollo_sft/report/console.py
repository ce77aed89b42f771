"""The console logger: a live bar in a terminal, one plain line a step elsewhere."""

from __future__ import annotations

from collections import deque

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from apollo_sft.report.log import say, terminal
from apollo_sft.report.metrics import Record

RATE_WINDOW = 50
"""Steps over which the time that is left is estimated."""


class Console:
    """`step` for every record; validation is printed as a line of its own. Does nothing when not enabled."""

    def __init__(self, total_steps: int, log_freq: int, enabled: bool) -> None:
        self._enabled = enabled
        self._total = total_steps
        self._log_freq = log_freq
        self._seconds: deque[float] = deque(maxlen=RATE_WINDOW)
        self._bar: Progress | None = None
        if enabled and terminal().is_terminal:
            columns = (
                TextColumn("training"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TextColumn("{task.fields[line]}"),
            )
            self._bar = Progress(*columns, console=terminal(), transient=True)
            self._task = self._bar.add_task("training", total=total_steps, line="")
            self._bar.start()

    def step(self, record: Record) -> None:
        if not self._enabled:
            return
        if "train/loss" in record:
            self._train(record)
        if "val/loss" in record:
            say(f"{self._place(record)}  validation loss {record['val/loss']:.4f} ({record['val/targets']:,} targets)")

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()

    def _train(self, record: Record) -> None:
        step = int(record["step"])
        self._seconds.append(float(record["train/step_seconds"]))
        if step == 2:
            self._seconds.popleft()  # the first step warms up and would make the estimate too long
        if self._bar is not None:
            self._bar.update(self._task, completed=step, line=self._numbers(record))
        elif step % self._log_freq == 0 or step in (1, self._total):
            say(f"{self._place(record)}  {self._numbers(record)}")

    def _place(self, record: Record) -> str:
        return f"step {int(record['step']):>{len(str(self._total))}}/{self._total}"

    def _numbers(self, record: Record) -> str:
        left = (self._total - int(record["step"])) * sum(self._seconds) / len(self._seconds)
        parts = (
            f"loss {record['train/loss']:.4f}",
            f"lr {record['train/lr']:.1e}",
            f"grad norm {record['train/grad_norm']:.2f}",
            f"{record['train/tokens_per_second']:,.0f} tok/s",
            f"eta {clock(left)}",
        )
        return "  ".join(parts)


def clock(seconds: float) -> str:
    """12:34, or 1:23:45 from an hour on."""
    hours, rest = divmod(round(seconds), 3600)
    minutes, rest = divmod(rest, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"

"""The console logger: a live bar in a terminal, aligned plain lines elsewhere."""

from __future__ import annotations

from collections import deque

from rich.console import Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from apollo_sft.report.log import say, terminal
from apollo_sft.report.metrics import Record, losses_by_name

RATE_WINDOW = 50
"""Number of steps from which the remaining time is estimated."""
BAR_WIDTH = 40
REFRESHES_PER_SECOND = 4


class Console:
    """Show every record that is passed to `step`; a validation has a line of its own. Do nothing when not enabled."""

    def __init__(self, total_steps: int, log_freq: int, enabled: bool) -> None:
        self._enabled = enabled
        self._total = total_steps
        self._log_freq = log_freq
        self._eta = Eta(total_steps)
        self._widths: dict[str, int] = {}
        self._done = 0
        self._place = ""
        self._numbers = "waiting for the first step"
        self._live: Live | None = None
        if enabled and terminal().is_terminal:
            self._live = Live(get_renderable=self._picture, console=terminal(), refresh_per_second=REFRESHES_PER_SECOND)
            self._live.start()

    def step(self, record: Record) -> None:
        """Show one record: of a training step, of a validation, or of both."""
        if not self._enabled:
            return

        step = int(record["step"])
        place = f"step {step:>{len(str(self._total))}}/{self._total}"
        if "train/loss" in record:
            self._train(record, step, place)

        if "val/loss" in record:
            # Each named validation set, after the loss over all of them.
            each = "".join(f"  {name} {loss:.4f}" for name, loss in losses_by_name(record, "val").items())
            say(f"{place}  validation loss {record['val/loss']:.4f} ({record['val/targets']:,} targets){each}")

    def close(self) -> None:
        """End the live display; its last state stays on the screen."""
        if self._live is not None:
            self._live.stop()

    def _train(self, record: Record, step: int, place: str) -> None:
        self._eta.add(float(record["train/step_seconds"]))
        eta = f"eta {clock(self._eta.seconds_left(step))}"

        parts = [
            f"loss {self._aligned(record, 'train/loss', '.4f')}",
            f"lr {record['train/lr']:.1e}",
            f"grad norm {self._aligned(record, 'train/grad_norm', '.2f')}",
            f"targets {self._aligned(record, 'train/targets', ',')}",
            f"{self._aligned(record, 'train/tokens_per_second', ',.0f')} tok/s",
        ]
        if "perf/mfu" in record:
            parts.append(f"mfu {record['perf/mfu']:.1%}")

        numbers = "  ".join(parts)

        # The live display draws these when it refreshes; elsewhere they are printed now, every few steps.
        self._done = step
        self._place = f"{place}  {eta}"
        self._numbers = numbers
        if self._live is None and (step % self._log_freq == 0 or step in (1, self._total)):
            say(f"{place}  {numbers}  {eta}")

    def _aligned(self, record: Record, name: str, form: str) -> str:
        """Format a value as wide as the widest one of this metric so far, so that columns stay aligned."""
        text = format(record[name], form)
        self._widths[name] = max(self._widths.get(name, 0), len(text))
        return text.rjust(self._widths[name])

    def _picture(self) -> RenderableType:
        """Draw the bar and the numbers on two lines, so that nothing is cut in a terminal of 80 columns."""
        bar = Table.grid(padding=(0, 2, 0, 0))
        bar.add_row(ProgressBar(total=self._total, completed=self._done, width=BAR_WIDTH), self._place)
        return Group(bar, Text(self._numbers))


class Eta:
    """Estimate the remaining time by the mean of the last steps.

    The first step of this process is left out as soon as there is a second one: it warms up and takes longer.
    """

    def __init__(self, total_steps: int) -> None:
        self._total = total_steps
        self._seconds: deque[float] = deque(maxlen=RATE_WINDOW)
        self._added = 0

    def add(self, step_seconds: float) -> None:
        """Take the duration of one more step."""
        if self._added == 1:
            self._seconds.popleft()
        self._seconds.append(step_seconds)
        self._added += 1

    def seconds_left(self, step: int) -> float:
        """Return the estimate after step `step` (from 1)."""
        return (self._total - step) * sum(self._seconds) / len(self._seconds)


def clock(seconds: float) -> str:
    """Format a duration: 12:34, or 1:23:45 from an hour on."""
    hours, rest = divmod(round(seconds), 3600)
    minutes, rest = divmod(rest, 60)
    if hours:
        return f"{hours}:{minutes:02}:{rest:02}"
    return f"{minutes}:{rest:02}"

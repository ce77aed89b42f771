"""TensorBoard: event files in `tensorboard/` of the run folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from apollo_sft.report.loggers.run_id import metrics_of
from apollo_sft.report.metrics import Record
from apollo_sft.report.sinks import REPLY_COLUMNS, RunInfo


class TensorBoard:
    """Write metrics as scalars and replies as texts."""

    def __init__(self, info: RunInfo) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # Steps that an earlier process logged after its last checkpoint are done again: they are dropped from the view.
        # Step 0, which a run from the start repeats too, is the validation before the first step.
        again_from = 0
        if info.first_step:
            again_from = info.first_step + 1

        self._writer = SummaryWriter(str(info.folder / "tensorboard"), purge_step=again_from)

    def log(self, record: Record) -> None:
        for name, value in metrics_of(record).items():
            self._writer.add_scalar(name, value, int(record["step"]))

    def replies(self, step: int, replies: Sequence[Mapping[str, Any]]) -> None:
        for number, reply in enumerate(replies):
            text = "\n\n".join(f"**{name}**\n\n{_quoted(str(reply[name]))}" for name in REPLY_COLUMNS)
            self._writer.add_text(f"val/reply_{number}", text, step)

    def close(self) -> None:
        self._writer.close()


def _quoted(text: str) -> str:
    """Return the text as a block of markdown that shows it unchanged."""
    return "\n".join(f"    {line}" for line in text.split("\n"))

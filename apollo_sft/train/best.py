"""The best validation of a run, and its patience."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from apollo_sft.report.metrics import Record


@dataclass(slots=True)
class BestSoFar:
    """Compares the validations of a run as they come. Every rank sees the same ones."""

    patience: int | None
    """Validations in a row without a better loss after which the run ends; None is no limit."""

    best: dict[str, Any] | None = None
    """`step` and `val/loss` of the best validation."""

    validations_since: int = 0
    """Validations after the best one."""

    def update(self, record: Record) -> bool:
        """Compare the validation in a record of metrics, if it holds one; return whether it is the best so far."""
        if "val/loss" not in record:
            return False
        if self.best is None or record["val/loss"] < self.best["val/loss"]:
            self.best = {"step": int(record["step"]), "val/loss": record["val/loss"]}
            self.validations_since = 0
            return True
        self.validations_since += 1
        return False

    def out_of_patience(self) -> bool:
        """Return whether `early_stop_patience` validations in a row brought nothing better."""
        return self.patience is not None and self.validations_since >= self.patience

"""Decide when a checkpoint is due, and resume from one."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.optim import Optimizer

from apollo_sft.checkpoint.model_folder.write import AdapterForm, ModelForm
from apollo_sft.checkpoint.run_folder.folder import RunFolder
from apollo_sft.checkpoint.run_folder.resume import read_facts
from apollo_sft.checkpoint.run_folder.state import read_state
from apollo_sft.config.schema import TrainerConfig
from apollo_sft.errors import ConfigError, TrainingError
from apollo_sft.model.sft_model import SftModel
from apollo_sft.parallel.consensus import Vote, from_main
from apollo_sft.parallel.launch import World
from apollo_sft.report.metrics import Record
from apollo_sft.train.best import BestSoFar
from apollo_sft.train.optim.build import fill_state
from apollo_sft.train.saving import Saver
from apollo_sft.train.strategy import strategy_of

SECONDS_PER_MINUTE = 60
DIGEST_LENGTH = 16


class Checkpoints:
    """The checkpoints of one run, in `checkpoints/` of its folder. All ranks call its methods together.

    `facts`: number of processes, key of the token store, config. `form`: how `hf/` is written; None writes none.
    """

    unfinished: Record | None
    """The metrics of a step whose validation was cut short, as the checkpoint that the run resumed from holds them."""

    def __init__(
        self,
        trainer: TrainerConfig,
        steps_per_epoch: int,
        last_step: int,
        facts: dict[str, Any],
        is_main: bool,
        form: ModelForm | AdapterForm | None,
    ) -> None:
        self.best = BestSoFar(trainer.early_stop_patience)
        self.unfinished = None
        self.saver = Saver(trainer, is_main, form)
        self._keeps_best = trainer.save_best_on is not None
        self._allows_changes = trainer.resume_with_changes
        self._hf_at_every = trainer.checkpoint.hf_model_at == "every"
        self._facts = facts
        self._last_step = last_step
        self._is_main = is_main
        self._every_steps, self._every_seconds = _frequency(trainer.save_freq, steps_per_epoch)
        self._saved_at = time.monotonic()

    @property
    def folder(self) -> Path:
        """Return the folder that holds the checkpoints."""
        return self.saver.folder

    def vote(self) -> Vote:
        """Return what this rank sends to the others with the next step."""
        vote = Vote.NOTHING
        if self.saver.has_failed():
            vote |= Vote.SAVE_FAILED

        # The clock of rank 0 decides for all.
        since_save = time.monotonic() - self._saved_at
        if self._is_main and self._every_seconds is not None and since_save >= self._every_seconds:
            vote |= Vote.SAVE_DUE
        return vote

    def after_step(
        self, step: int, record: Record, votes: Vote, model: SftModel, optimizer: Optimizer, unfinished: bool = False
    ) -> bool:
        """Save if it is time after `step` steps, and return whether it was.

        `record`: metrics of the step. `votes`: of all ranks. `unfinished`: its validation was cut short; the checkpoint
        then keeps the record for the run that resumes.
        Raises: CheckpointError on every rank when a save could not be written; earlier checkpoints are untouched.
        """
        if votes & Vote.SAVE_FAILED:
            self.wait_for_save()

        is_best = self.best.update(record) and self._keeps_best
        is_last = step == self._last_step or self.best.out_of_patience()
        if not (self._is_due(step, votes) or is_best or is_last or votes & Vote.STOP):
            return False

        self.unfinished = None
        if unfinished:
            self.unfinished = record
        with_hf = is_best or is_last or self._hf_at_every or (unfinished and self._keeps_best)
        self.save(step, model, optimizer, is_best, with_hf)
        if is_last or votes & Vote.STOP:
            self.wait_for_save()
        return True

    def finish_validation(self, record: Record) -> None:
        """Compare the checkpoint that the run resumed from, once its validation is done: it may be the best.

        `record`: that of `unfinished` with the validation.
        """
        self.unfinished = None
        if self.best.update(record) and self._keeps_best:
            self.saver.point_best(int(record["step"]))

    def save(self, step: int, model: SftModel, optimizer: Optimizer, is_best: bool, with_hf: bool) -> None:
        """Save the state after `step` steps. Raises: CheckpointError on every rank, as `Saver.save`."""
        self._saved_at = time.monotonic()
        facts = self._facts | {
            "step": step,
            "contents": list(self.saver.contents),
            "best": self.best.best,
            "validations_since_best": self.best.validations_since,
            "unfinished": self.unfinished,
        }
        self.saver.save(model, optimizer, facts, is_best, with_hf)

    def wait_for_save(self) -> None:
        """Wait for a save in the background. Raises: CheckpointError on every rank when it could not be written."""
        self.saver.wait_for_save()

    @contextmanager
    def waiting_on_failure(self) -> Iterator[None]:
        """Wait for a save in the background when a step fails: all ranks fail alike, and that save is a good one."""
        try:
            yield
        except TrainingError:
            self.wait_for_save()
            raise

    def resume(self, folder: RunFolder | None, world: World, model: SftModel, optimizer: Optimizer) -> int:
        """Fill model and optimizer from the checkpoint that rank 0 has found, as `begin`. `folder`: None off rank 0."""
        newest = None
        if folder is not None:
            newest = folder.resume_from
        newest = from_main(newest, world)
        return self.begin(newest, model, optimizer)

    def begin(self, checkpoint: Path | None, model: SftModel, optimizer: Optimizer) -> int:
        """Fill model and optimizer from a checkpoint, when there is one; return the number of steps done.

        Raises: ConfigError when the training data are others than then; CheckpointError.
        """
        strategy = strategy_of(model)
        rows = strategy.as_row_sharded(model)
        moments = strategy.optimizer_as_row_sharded(model, rows, optimizer)
        self.saver.measure(rows, moments)
        if checkpoint is None:
            return 0

        saved = read_facts(checkpoint)
        self._check_data(checkpoint, saved["data"])
        step = int(saved["step"])
        same_ranks = saved["processes"] == self._facts["processes"]
        if not same_ranks:
            torch.manual_seed(torch.initial_seed() + step)  # the saved random states belong to other ranks

        fill_state(moments)
        read_state(checkpoint, rows, moments, step, same_ranks)
        strategy.load_row_sharded(model, optimizer, rows, moments)

        self.best.best = saved["best"]
        self.best.validations_since = saved["validations_since_best"]
        if checkpoint.parent == self.folder:
            self.unfinished = saved.get("unfinished")
        return step

    def _is_due(self, step: int, votes: Vote) -> bool:
        if self._every_seconds is not None:
            return bool(votes & Vote.SAVE_DUE)
        return step % self._every_steps == 0

    def _check_data(self, checkpoint: Path, then: str) -> None:
        """Raise ConfigError when the checkpoint was trained on other tokens, and changes are not allowed."""
        now = self._facts["data"]
        if then != now and not self._allows_changes:
            raise ConfigError(
                f"{checkpoint} was trained on other tokens than those that the data files give now",
                found=f"token store {_shortened(now)}",
                expected=f"token store {_shortened(then)} (data, tokenizer, template and library versions as then)",
                fix="put the data back; or trainer.resume_mode=disable, which moves that run to previous-<time>/",
            )


def _frequency(save_freq: int | str, steps_per_epoch: int) -> tuple[int, float | None]:
    """Return the steps between two saves and, where they are due by the clock, the seconds."""
    if isinstance(save_freq, str) and save_freq.endswith("min"):
        return steps_per_epoch, SECONDS_PER_MINUTE * float(save_freq.removesuffix("min"))
    if isinstance(save_freq, int) and save_freq > 0:
        return save_freq, None
    return steps_per_epoch, None


def _shortened(data_key: str) -> str:
    """Return the key with a shorter digest. How sources are mixed follows it, if they are."""
    digest, *mixed = data_key.split(" ", 1)
    return " ".join([f"{digest[:DIGEST_LENGTH]}…", *mixed])

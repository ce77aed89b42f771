"""When a checkpoint is due, and saving it: written aside, synced, then made visible; the oldest go after the newest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.optim import Optimizer

from apollo_sft.checkpoint import publish, resume
from apollo_sft.checkpoint.agree import agree, attempt
from apollo_sft.checkpoint.state import read_facts, read_state, write_state
from apollo_sft.config.schema import TrainerConfig
from apollo_sft.errors import ConfigError
from apollo_sft.model.sft_model import SftModel


class Checkpoints:
    """Those of one run, in `checkpoints/` of its folder. `facts`: number of processes and key of the token store."""

    def __init__(self, trainer: TrainerConfig, steps_per_epoch: int, facts: dict[str, Any], is_main: bool) -> None:
        self.folder = Path(trainer.default_local_dir).absolute() / "checkpoints"
        self._facts = facts
        self._keep = trainer.max_ckpt_to_keep
        self._is_main = is_main
        frequency = trainer.save_freq
        self._every = frequency if isinstance(frequency, int) and frequency > 0 else steps_per_epoch

    def due(self, step: int, last_step: int) -> bool:
        """Whether a checkpoint follows after `step` steps: every so often, and after the last one."""
        return step % self._every == 0 or step == last_step

    def save(self, step: int, model: SftModel, optimizer: Optimizer) -> None:
        """Collective.

        Raises: CheckpointError on every rank when it could not be written; earlier checkpoints are untouched.
        """
        final = resume.folder_of(self.folder, step)
        staging = self.folder / f"{publish.STAGING_PREFIX}{final.name}"
        failure = attempt(lambda: publish.staging_folder(self.folder, final.name)) if self._is_main else None
        agree(failure, model)
        facts = {"step": step} | self._facts
        agree(attempt(lambda: write_state(staging, model, optimizer, facts, self._is_main)), model)
        if self._is_main:
            failure = attempt(lambda: self._publish(staging, final))
        agree(failure, model)

    def _publish(self, staging: Path, final: Path) -> None:
        if final.exists():  # damaged, or it would have been gone on from
            final.rename(self.folder / f"{publish.STAGING_PREFIX}damaged-{final.name}")
        publish.publish_directory(staging, final)
        publish.recover(self.folder)
        resume.prune(self.folder, self._keep)

    def go_on(self, checkpoint: Path | None, model: SftModel, optimizer: Optimizer) -> int:
        """Fill model and optimizer from a checkpoint, when there is one; the number of steps done. Collective.

        Raises: ConfigError when the training data are others than then; CheckpointError.
        """
        if checkpoint is None:
            return 0
        saved = read_facts(checkpoint)
        if saved["data"] != self._facts["data"]:
            raise ConfigError(
                f"{checkpoint} was trained on other tokens than those that the data files give now",
                found=f"token store {self._facts['data'][:16]}…",
                expected=f"token store {saved['data'][:16]}… (data, tokenizer, template and library versions as then)",
                fix="put the data back; or trainer.resume_mode=disable, which moves that run to previous-<time>/",
            )
        step = int(saved["step"])
        same_ranks = saved["processes"] == self._facts["processes"]
        if not same_ranks:
            torch.manual_seed(torch.initial_seed() + step)  # the saved random states belong to other ranks
        read_state(checkpoint, model, optimizer, step, same_ranks)
        return step

"""When a checkpoint is due, and saving it: written aside, synced, then made visible; the oldest go after the newest."""

from __future__ import annotations

import os
import shutil
import time
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.filesize import decimal
from torch import Tensor
from torch.optim import Optimizer

from apollo_sft.checkpoint import publish
from apollo_sft.checkpoint.agree import agree, attempt, check_room, explained
from apollo_sft.checkpoint.host_memory import MEMORY_RATIO, available_memory
from apollo_sft.checkpoint.model_folder.write import HF_FOLDER, AdapterForm, ModelForm
from apollo_sft.checkpoint.run_folder import resume
from apollo_sft.checkpoint.run_folder.resume import PARTS, read_facts
from apollo_sft.checkpoint.run_folder.state import num_bytes, read_state, snapshot, write_state
from apollo_sft.config.schema import TrainerConfig
from apollo_sft.errors import BaseFilesError, CheckpointError, ConfigError
from apollo_sft.model.sft_model import SftModel
from apollo_sft.report.log import say
from apollo_sft.report.metrics import Record
from apollo_sft.train.optim.build import fill_state, state_bytes
from apollo_sft.train.step import Vote
from apollo_sft.train.strategy import strategy_of

WAIT = timedelta(days=7)
"""Of the group in which a save is agreed upon: how long the writing of another rank takes depends on the disk."""


class Checkpoints:
    """Those of one run, in `checkpoints/` of its folder. Every rank decides alike; methods are collective.

    `facts`: number of processes, key of the token store, config. `form`: how `hf/` is made; None makes none.
    """

    def __init__(
        self,
        trainer: TrainerConfig,
        steps_per_epoch: int,
        last_step: int,
        facts: dict[str, Any],
        is_main: bool,
        form: ModelForm | AdapterForm | None,
    ) -> None:
        self.folder = Path(trainer.default_local_dir).absolute() / "checkpoints"
        self.best: dict[str, Any] | None = None
        self.unfinished: Record | None = None
        self._validations_since_best = 0
        self._keep = trainer.max_ckpt_to_keep
        self._patience = trainer.early_stop_patience
        self._keeps_best = trainer.save_best_on is not None
        self._allows_changes = trainer.resume_with_changes
        self._contents = trainer.checkpoint.save_contents
        self._hf_at_every = trainer.checkpoint.hf_model_at == "every"
        self._facts = facts
        self._last_step = last_step
        self._is_main = is_main
        self._form = form
        self._parts = set(self._contents) & set(PARTS)
        frequency = trainer.save_freq
        self._every = frequency if isinstance(frequency, int) and frequency > 0 else steps_per_epoch
        self._seconds = 60 * int(str(frequency).removesuffix("min")) if str(frequency).endswith("min") else None
        self._saved_at = time.monotonic()
        self._in_background = trainer.checkpoint.async_save
        self._needed_bytes = 0
        self._group = dist.new_group(backend="gloo", timeout=WAIT) if dist.is_initialized() else None
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._running: Future[None] | None = None

    def out_of_patience(self) -> bool:
        """Whether `early_stop_patience` validations in a row brought nothing new."""
        return self._patience is not None and self._validations_since_best >= self._patience

    def vote(self) -> Vote:
        """What this rank has to say to the others with the next step."""
        vote = Vote.NOTHING
        if self._running is not None and self._running.done() and self._running.exception() is not None:
            vote |= Vote.SAVE_FAILED
        if self._is_main and self._seconds is not None and time.monotonic() - self._saved_at >= self._seconds:
            vote |= Vote.SAVE_DUE
        return vote

    def after_step(
        self, step: int, record: Record, votes: Vote, model: SftModel, optimizer: Optimizer, unfinished: bool = False
    ) -> bool:
        """Save if it is time after `step` steps; whether it was. `record`: metrics of the step; `votes`: of all ranks.

        `unfinished`: its validation was cut short. The checkpoint then keeps the record for the run that goes on.
        Raises: CheckpointError on every rank when a save could not be written; earlier checkpoints are untouched.
        """
        if votes & Vote.SAVE_FAILED:
            self.settle()
        is_best = self.judge(step, record) and self._keeps_best
        is_last = step == self._last_step or self.out_of_patience()
        by_time = self._seconds is not None
        due = bool(votes & Vote.SAVE_DUE) if by_time else step % self._every == 0
        if not (due or is_best or is_last or votes & Vote.STOP):
            return False
        self.unfinished = record if unfinished else None
        with_hf = is_best or is_last or self._hf_at_every or (unfinished and self._keeps_best)
        self.save(step, model, optimizer, is_best, with_hf)
        if is_last or votes & Vote.STOP:
            self.settle()
        return True

    def make_up(self, record: Record) -> None:
        """`record` is that of `unfinished` with its validation: its checkpoint may turn out to be the best one."""
        self.unfinished = None
        step = int(record["step"])
        if self.judge(step, record) and self._keeps_best:
            target = resume.folder_of(self.folder, step).name
            point = partial(publish.point, self.folder / resume.BEST, target)
            agree(attempt(point) if self._is_main else None, group=self._group)

    def judge(self, step: int, record: Record) -> bool:
        """Whether the validation in `record`, if there is one, is the best so far; counts those that are not."""
        if "val/loss" not in record:
            return False
        if self.best is None or record["val/loss"] < self.best["val/loss"]:
            self.best = {"step": step, "val/loss": record["val/loss"]}
            self._validations_since_best = 0
            return True
        self._validations_since_best += 1
        return False

    def save(self, step: int, model: SftModel, optimizer: Optimizer, is_best: bool, with_hf: bool) -> None:
        """Save, in the background when so configured: then the next save, or `settle`, waits for this one.

        Raises: CheckpointError on every rank when it, or the one before it, could not be written.
        """
        self.settle()
        self._saved_at = time.monotonic()
        final = resume.folder_of(self.folder, step)
        with_hf = with_hf and self._form is not None
        parts = self._parts | ({"model"} if with_hf else set())
        agree(attempt(partial(self._open, final.name)) if self._is_main else None, group=self._group)
        strategy = strategy_of(model)
        rows = strategy.by_rows(model)
        moments = strategy.optimizer_by_rows(model, rows, optimizer)
        tensors = snapshot(rows, moments, parts, copy=self._in_background)
        facts = self._facts | {
            "step": step,
            "contents": list(self._contents),
            "best": self.best,
            "validations_since_best": self._validations_since_best,
            "unfinished": self.unfinished,
        }
        write = partial(self._write, final, tensors, facts, is_best, with_hf)
        if self._in_background:
            self._running = self._pool.submit(write)
        else:
            write()

    def settle(self) -> None:
        """Wait for a save in the background. Raises: CheckpointError on every rank when it could not be written."""
        running, self._running = self._running, None
        if running is not None:
            running.result()

    def _open(self, name: str) -> None:
        check_room(self.folder, self._needed_bytes, "a checkpoint")
        publish.staging_folder(self.folder, name)

    def _write(self, final: Path, tensors: dict[str, Tensor], facts: dict[str, Any], is_best: bool, hf: bool) -> None:
        staging = self.folder / f"{publish.STAGING_PREFIX}{final.name}"
        work = partial(write_state, staging, tensors, facts, self._is_main, self._group)
        try:
            agree(explained(attempt(work), self.folder, self._needed_bytes), group=self._group)
            work = partial(self._publish, staging, final, is_best, hf)
            failure = attempt(work) if self._is_main else None
            agree(explained(failure, self.folder, self._needed_bytes), group=self._group)
        except CheckpointError:
            if self._is_main:
                shutil.rmtree(staging, ignore_errors=True)  # gives the room back; what is left goes at the next start
            raise

    def _publish(self, staging: Path, final: Path, is_best: bool, with_hf: bool) -> None:
        lost: BaseFilesError | None = None
        if with_hf and self._form is not None:
            try:
                self._form.write(staging)
            except BaseFilesError as error:  # the state is whole, and is kept
                lost = error
                shutil.rmtree(staging / HF_FOLDER)
        if "model" not in self._parts and lost is None:  # it was written for hf/ only
            for path in staging.glob("*.safetensors"):
                path.unlink()
        metrics = self.folder.parent / "metrics.jsonl"
        if metrics.is_file():  # no step that is done for good may be missing there
            publish.sync_file(metrics)
        publish.sync_folder(self.folder.parent)
        if final.exists():  # damaged, or it would have been gone on from
            final.rename(self.folder / f"{publish.STAGING_PREFIX}damaged-{final.name}")
        publish.publish_directory(staging, final)
        publish.point(self.folder / resume.LATEST, final.name)
        if is_best:
            publish.point(self.folder / resume.BEST, final.name)
        publish.recover(self.folder)
        if lost is not None:
            raise lost
        resume.prune(self.folder, self._keep)

    def begin(self, checkpoint: Path | None, model: SftModel, optimizer: Optimizer) -> int:
        """Fill model and optimizer from a checkpoint, when there is one; the number of steps done.

        Raises: ConfigError when the training data are others than then; CheckpointError.
        """
        strategy = strategy_of(model)
        rows = strategy.by_rows(model)
        moments = strategy.optimizer_by_rows(model, rows, optimizer)
        self._needed_bytes = num_bytes(rows, state_bytes(moments), self._parts)
        self._needed_bytes += self._form.num_bytes if self._form else 0
        copied = num_bytes(rows, state_bytes(moments, local=True), self._parts, local=True)
        self._in_background = self._in_background and self._has_memory(copied)
        if checkpoint is None:
            return 0
        saved = read_facts(checkpoint)
        if saved["data"] != self._facts["data"] and not self._allows_changes:
            raise ConfigError(
                f"{checkpoint} was trained on other tokens than those that the data files give now",
                found=f"token store {_shortened(self._facts['data'])}",
                expected=f"token store {_shortened(saved['data'])} "
                "(data, tokenizer, template and library versions as then)",
                fix="put the data back; or trainer.resume_mode=disable, which moves that run to previous-<time>/",
            )
        step = int(saved["step"])
        same_ranks = saved["processes"] == self._facts["processes"]
        if not same_ranks:
            torch.manual_seed(torch.initial_seed() + step)  # the saved random states belong to other ranks
        fill_state(moments)
        read_state(checkpoint, rows, moments, step, same_ranks)
        strategy.take_rows(model, optimizer, rows, moments)
        self.best, self._validations_since_best = saved["best"], saved["validations_since_best"]
        if checkpoint.parent == self.folder:
            self.unfinished = saved.get("unfinished")
        return step

    def _has_memory(self, copy_bytes: int) -> bool:
        """Whether the ranks of every host may each copy that much. Says what checkpoints cost."""
        ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        enough = torch.tensor(int(copy_bytes * ranks <= MEMORY_RATIO * available_memory()))
        if self._group is not None:
            dist.all_reduce(enough, op=dist.ReduceOp.MIN, group=self._group)
        text = f"a checkpoint takes {decimal(self._needed_bytes)} on the disk"
        if self._form is not None:
            text += f", of which hf/ {decimal(self._form.num_bytes)}"
        if enough:
            say(f"{text}; while it is written, {decimal(copy_bytes)} of CPU memory on each rank")
        else:
            say(f"{text}; training waits while it is written, since the CPU memory holds no copy")
        return bool(enough)


def _shortened(data_key: str) -> str:
    """Of the digest the start; how sources are mixed, if they are, stands behind it."""
    digest, *mixed = data_key.split(" ", 1)
    return " ".join([f"{digest[:16]}…", *mixed])

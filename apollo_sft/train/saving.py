"""Save a checkpoint: write it aside, sync it, then make it visible; the oldest go after the newest."""

from __future__ import annotations

import os
import shutil
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
from apollo_sft.checkpoint.model_folder.write import HF_FOLDER, AdapterForm, ModelForm
from apollo_sft.checkpoint.room import MEMORY_RATIO, available_memory, check_room, explained
from apollo_sft.checkpoint.run_folder import resume
from apollo_sft.checkpoint.run_folder.resume import PARTS
from apollo_sft.checkpoint.run_folder.state import num_bytes, snapshot, write_state
from apollo_sft.config.schema import TrainerConfig
from apollo_sft.errors import BaseFilesError, CheckpointError
from apollo_sft.model.sft_model import SftModel
from apollo_sft.parallel.consensus import attempt, raise_on_all
from apollo_sft.report.log import say
from apollo_sft.train.optim.build import state_bytes
from apollo_sft.train.strategy import strategy_of

WAIT = timedelta(days=7)
"""The timeout of the group of saves: how long the writing of another rank takes depends on the disk."""


class Saver:
    """Writes the checkpoints of one run into `folder`. All ranks call its methods together.

    `form` writes `hf/`; None writes none.
    """

    def __init__(self, trainer: TrainerConfig, is_main: bool, form: ModelForm | AdapterForm | None) -> None:
        self.folder = Path(trainer.default_local_dir).absolute() / "checkpoints"
        self.contents = trainer.checkpoint.save_contents
        self.group = None
        if dist.is_initialized():
            # A group of its own: a save in the background must not mix its messages with those of a step.
            self.group = dist.new_group(backend="gloo", timeout=WAIT)
        self._parts = set(self.contents) & set(PARTS)
        self._keep = trainer.max_ckpt_to_keep
        self._is_main = is_main
        self._form = form
        self._in_background = trainer.checkpoint.async_save
        self._needed_bytes = 0
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._running: Future[None] | None = None

    def measure(self, rows: Any, moments: Optimizer) -> None:
        """Find out what a checkpoint takes, and whether it can be written in the background."""
        self._needed_bytes = num_bytes(rows, state_bytes(moments), self._parts)
        if self._form is not None:
            self._needed_bytes += self._form.num_bytes
        copied = num_bytes(rows, state_bytes(moments, local=True), self._parts, local=True)
        self._in_background = self._in_background and self._has_memory(copied)

    def save(self, model: SftModel, optimizer: Optimizer, facts: dict[str, Any], is_best: bool, with_hf: bool) -> None:
        """Save the state after `facts["step"]` steps, in the background when so configured.

        The next save, or `wait_for_save`, waits for one in the background.
        Raises: CheckpointError on every rank when it, or the one before it, could not be written.
        """
        self.wait_for_save()
        final = resume.folder_of(self.folder, facts["step"])
        with_hf = with_hf and self._form is not None
        parts = set(self._parts)
        if with_hf:
            parts.add("model")  # `hf/` is made of the weights
        self._on_main(partial(self._open, final.name))

        strategy = strategy_of(model)
        rows = strategy.as_row_sharded(model)
        moments = strategy.optimizer_as_row_sharded(model, rows, optimizer)
        tensors = snapshot(rows, moments, parts, copy=self._in_background)

        write = partial(self._write, final, tensors, facts, is_best, with_hf)
        if self._in_background:
            self._running = self._pool.submit(write)
        else:
            write()

    def wait_for_save(self) -> None:
        """Wait for a save in the background. Raises: CheckpointError on every rank when it could not be written."""
        running = self._running
        self._running = None  # before the result: a failed save is reported once
        if running is not None:
            running.result()

    def has_failed(self) -> bool:
        """Return whether a save in the background has failed on this rank."""
        return self._running is not None and self._running.done() and self._running.exception() is not None

    def point_best(self, step: int) -> None:
        """Point the link `best` to the checkpoint of a step. Raises: CheckpointError on every rank."""
        target = resume.folder_of(self.folder, step).name
        self._on_main(partial(publish.point, self.folder / resume.BEST, target))

    def _on_main(self, work: Any) -> None:
        """Run `work` on rank 0, and raise its failure on every rank."""
        failure = None
        if self._is_main:
            failure = attempt(work)
        raise_on_all(failure, group=self.group)

    def _open(self, name: str) -> None:
        check_room(self.folder, self._needed_bytes, "a checkpoint")
        publish.staging_folder(self.folder, name)

    def _write(self, final: Path, tensors: dict[str, Tensor], facts: dict[str, Any], is_best: bool, hf: bool) -> None:
        staging = self.folder / f"{publish.STAGING_PREFIX}{final.name}"
        write = partial(write_state, staging, tensors, facts, self._is_main, self.group)
        make_visible = partial(self._publish, staging, final, is_best, hf)
        try:
            raise_on_all(self._attempt(write), group=self.group)
            failure = None
            if self._is_main:
                failure = self._attempt(make_visible)
            raise_on_all(failure, group=self.group)
        except CheckpointError:
            if self._is_main:
                shutil.rmtree(staging, ignore_errors=True)  # gives the room back; what is left goes at the next start
            raise

    def _attempt(self, work: Any) -> Exception | None:
        """Run `work`, and return its failure, as one about the disk where that is full or read-only."""
        return explained(attempt(work), self.folder, self._needed_bytes)

    def _publish(self, staging: Path, final: Path, is_best: bool, with_hf: bool) -> None:
        failure: BaseFilesError | None = None
        if with_hf and self._form is not None:
            try:
                self._form.write(staging)
            except BaseFilesError as error:  # the state itself is complete, and is kept
                failure = error
                shutil.rmtree(staging / HF_FOLDER)
        if "model" not in self._parts and failure is None:  # it was written for hf/ only
            for path in staging.glob("*.safetensors"):
                path.unlink()

        metrics = self.folder.parent / "metrics.jsonl"
        if metrics.is_file():  # no step that is done for good may be missing there
            publish.sync_file(metrics)
        publish.sync_folder(self.folder.parent)

        if final.exists():  # damaged, or the run would have resumed from it
            final.rename(self.folder / f"{publish.STAGING_PREFIX}damaged-{final.name}")
        publish.publish_directory(staging, final)
        publish.point(self.folder / resume.LATEST, final.name)
        if is_best:
            publish.point(self.folder / resume.BEST, final.name)
        publish.recover(self.folder)

        if failure is not None:
            raise failure
        resume.prune(self.folder, self._keep)

    def _has_memory(self, copy_bytes: int) -> bool:
        """Return whether the ranks of every host may each copy that much, and log what checkpoints cost."""
        ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        enough = torch.tensor(int(copy_bytes * ranks <= MEMORY_RATIO * available_memory()))
        if self.group is not None:
            dist.all_reduce(enough, op=dist.ReduceOp.MIN, group=self.group)

        text = f"a checkpoint takes {decimal(self._needed_bytes)} on the disk"
        if self._form is not None:
            text += f", of which hf/ {decimal(self._form.num_bytes)}"
        if enough:
            say(f"{text}; while it is written, {decimal(copy_bytes)} of CPU memory on each rank")
        else:
            say(f"{text}; training waits while it is written, since the CPU memory holds no copy")
        return bool(enough)

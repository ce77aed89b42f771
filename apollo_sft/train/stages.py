"""The stages of a run: which ranks work, what a signal may do meanwhile, and what run.json records.

A stage has a name that completes the sentence "this came while …": `preparing the data`. Errors, signals, run.json and
the report use that name.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch.distributed as dist

from apollo_sft.checkpoint.room import explained
from apollo_sft.checkpoint.run_folder.folder import RunFolder, Status, status_of
from apollo_sft.errors import AlreadyDone, ApolloError, Preempted, Stopped, TrainingError
from apollo_sft.parallel import consensus, launch
from apollo_sft.parallel.launch import World
from apollo_sft.report.log import warn
from apollo_sft.train.signals import NOTHING_TO_SAVE, StopFlag
from apollo_sft.types import ignore

T = TypeVar("T")


class Stages:
    """Runs the stages of one training, on every rank.

    In a stage a signal ends the run at once, unless it is entered by `between_steps`. An error that comes in a stage
    names it. On rank 0, once the run folder is claimed, run.json names the present stage and the seconds of all stages.

    `run_path`: where the run folder is, for errors of its disk.
    """

    world: World
    """The processes of the run, once `process_group` is entered."""

    seconds: dict[str, float]
    """Seconds of each stage that has ended, on this rank."""

    def __init__(self, stop: StopFlag, run_path: str) -> None:
        self.seconds = {}
        self._run_path = run_path
        self._stop = stop
        self._folder: RunFolder | None = None
        self._status: Status = "running"
        self._facts: dict[str, Any] = {}
        self._stage: str | None = None

    # What is entered at the start of a run and left at its end

    @contextmanager
    def process_group(self, device: str, needs_group: bool, timeout_seconds: float) -> Iterator[World]:
        """Join the other processes, and leave the group at the end. Raises: TopologyError, as `launch.start`."""
        self.world = self.on_all("joining the other processes", launch.start, device, needs_group, timeout_seconds)
        try:
            yield self.world
        except BaseException:
            # With several ranks the group stays open: the others must not lose their connections before this rank
            # has logged why.
            if self.world.size == 1:
                launch.stop()
            raise

        if dist.is_initialized():
            gc.collect()  # frees what holds sub-groups, which must be gone before the group itself
        launch.stop()

    @contextmanager
    def heartbeat(self, limit_seconds: float) -> Iterator[Callable[[], object]]:
        """Watch over the other ranks, and end this one when another is lost. Gives what is called after each step."""
        if self.world.size == 1:
            yield ignore
            return
        from apollo_sft.parallel.pulse import Pulse

        def end_at_once(found: str) -> None:
            self._stop.end_now("failed", TrainingError.exit_code, found)

        with Pulse(self.world, limit_seconds, lost=end_at_once, stuck=warn) as pulse:
            yield pulse.step_ended

    @contextmanager
    def run_folder(self, claim: Callable[[], RunFolder]) -> Iterator[RunFolder | None]:
        """Claim the run folder on rank 0, and write into its run.json how the run ended. Gives None off rank 0."""
        self._folder = self.on_main("claiming the run folder", claim)
        if self._folder is not None:
            self._stop.on_exit = self._on_exit

        try:
            yield self._folder
            self.model_is_written()
        except (ApolloError, Stopped) as error:
            self._end(status_of(error.exit_code))
            raise
        except BaseException:
            self._end("failed")
            raise
        finally:
            self._stop.never()
            self._leave_folder()

    # Who works

    def on_main(self, stage: str, work: Callable[..., T], *arguments: Any, kept: str = NOTHING_TO_SAVE) -> T | None:
        """Run `work` on rank 0 and return its result there, None elsewhere; the other ranks wait, or exit with it."""
        with self._during(stage, kept):
            return consensus.on_main(self.world, stage, lambda: work(*arguments))

    def once_per_host(self, stage: str, work: Callable[..., T], *arguments: Any) -> T:
        """Run `work` on one rank of each host, then on the others, which find its files there."""
        with self._during(stage):
            return consensus.once_per_host(self.world, stage, lambda: work(*arguments))

    def on_all(self, stage: str, work: Callable[..., T], *arguments: Any, kept: str = NOTHING_TO_SAVE) -> T:
        """Run `work` on every rank. `kept`: what a user has when a signal ends the run here."""
        with self._during(stage, kept):
            return work(*arguments)

    def must_agree(self, stage: str, facts: Mapping[str, Any]) -> None:
        """Refuse the run unless all ranks have the same facts. Raises: ConfigError, as `consensus.must_agree`."""
        with self._during(stage):
            consensus.must_agree(self.world, stage, facts)

    @contextmanager
    def between_steps(self, stage: str) -> Iterator[None]:
        """Run a stage in which a signal only sets the flag, for the loop to end after the step."""
        with self._during(stage, between_steps=True):
            yield

    # What run.json records

    def record(self, facts: Mapping[str, Any] | None) -> None:
        """Add facts to run.json, with the next stage."""
        self._facts |= facts or {}

    def model_is_written(self) -> None:
        """Count the run as finished, whatever becomes of what follows."""
        self._stop.never()
        self._status = "finished"

    @contextmanager
    def _during(self, stage: str, kept: str = NOTHING_TO_SAVE, between_steps: bool = False) -> Iterator[None]:
        self._stage = stage
        if between_steps:
            self._stop.between_steps(stage)
        else:
            self._stop.at_once(stage, kept)

        start = time.monotonic()
        try:
            self._write()
            yield
            self._stage = None
        except (AlreadyDone, Preempted):
            raise
        except Exception as error:
            failure = self._explained(error)
            failure.add_note(f"while:    {stage}")
            if failure is error:
                raise
            raise failure from error
        finally:
            self.seconds[stage] = round(time.monotonic() - start, 3)

    def _explained(self, error: Exception) -> Exception:
        """Return the error, as one about the disk where that is full or read-only."""
        if not isinstance(error, OSError):
            return error
        where = self._run_path
        if isinstance(error.filename, str):
            where = error.filename
        return explained(error, Path(where), None, "this run") or error

    def _end(self, status: Status) -> None:
        """Note how the run ended, unless its model is written."""
        if self._status == "running":
            self._status = status

    def _write(self) -> None:
        if self._folder is not None:
            self._folder.write_run(self._status, **self._facts, stage=self._stage, stages=self.seconds)

    def _on_exit(self, status: Literal["preempted", "failed"]) -> None:
        """Write how the run ended, from the thread that ends the process."""
        self._end(status)
        self._write()

    def _leave_folder(self) -> None:
        """Write how the run ended. A disk that is full or gone must not hide why it did."""
        if self._folder is None:
            return
        try:
            self._write()
        except OSError as error:
            warn(f"{self._folder.run_json} could not be updated to record that the run has {self._status}: {error}")
        finally:
            self._stop.on_exit = ignore
            self._folder.release()

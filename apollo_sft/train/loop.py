"""The training loop. Its whole state is one integer: the number of steps done."""

from __future__ import annotations

from apollo_sft.errors import Preempted
from apollo_sft.parallel.consensus import Vote, any_rank
from apollo_sft.report.metrics import Record
from apollo_sft.train.run_state import Run
from apollo_sft.train.signals import StopFlag
from apollo_sft.train.step import train_step
from apollo_sft.train.validation import validation_record


def run_loop(run: Run, stop: StopFlag, first_step: int) -> None:
    """Train from `first_step`, the number of steps done before, to the last, or until validations show no progress.

    Raises: TrainingError when a step is not finite; Preempted when a signal asked for the end and the state is saved.
    """
    if run.checkpoints.unfinished is not None:
        _finish_validation(run, stop, run.checkpoints.unfinished)
    # The run had trained its last step before, and was stopped before its model was written.
    if run.checkpoints.best.out_of_patience():
        return

    if run.config.trainer.val_before_train and run.val is not None and first_step == 0:
        validation = validation_record(run, stop, 0)
        if validation is None:
            raise _preempted(run, stop, 0)
        run.reporter.record({"step": 0} | validation)

    clip = run.config.optim.clip_grad
    for batch in run.meter.batches(run.train.batches(range(first_step, run.schedule.total_steps))):
        run.step_ended()
        rate = run.schedule.rate(batch.step)
        for group in run.optimizer.param_groups:
            group["lr"] = rate

        vote = run.checkpoints.vote()
        if stop.name is not None:
            vote |= Vote.STOP
        result = train_step(run.model, run.optimizer, batch, run.world, clip, vote)
        _after_step(run, stop, run.meter.record(batch, result, rate), result.votes)
        if run.checkpoints.best.out_of_patience():
            return


def _after_step(run: Run, stop: StopFlag, record: Record, votes: Vote) -> None:
    """Validate, record the metrics and save, each when it is due.

    A stop during the validation saves the state without it; the run that resumes validates first. Raises: Preempted.
    """
    step = int(record["step"])
    validation = _validation(run, stop, step)
    if validation is not None:
        record |= validation
        run.reporter.record(record)
    else:
        votes |= Vote.STOP

    saved = run.checkpoints.after_step(step, record, votes, run.model, run.optimizer, validation is None)
    if votes & Vote.STOP or (saved and any_rank(stop.name is not None, run.world)):
        run.checkpoints.wait_for_save()
        raise _preempted(run, stop, step)


def _finish_validation(run: Run, stop: StopFlag, record: Record) -> None:
    """Run the validation that a stop cut short, and record its step. Raises: Preempted."""
    step = int(record["step"])
    validation = _validation(run, stop, step)
    if validation is None:
        raise _preempted(run, stop, step)
    run.reporter.record(record | validation)
    run.checkpoints.finish_validation(record | validation)


def _validation(run: Run, stop: StopFlag, step: int) -> Record | None:
    """Return the metrics of the validation after `step` steps; empty when none is due; None after a stop."""
    if not run.validates_after(step - 1):
        return {}
    return validation_record(run, stop, step)


def _preempted(run: Run, stop: StopFlag, step: int) -> Preempted:
    kept = "the state is saved"
    if step == 0:
        kept = "there was nothing to save"
    return Preempted(
        f"stopped by {stop.name or 'a signal to another rank'} after step {step} of {run.schedule.total_steps}; {kept}",
        fix="the same command resumes from there",
    )

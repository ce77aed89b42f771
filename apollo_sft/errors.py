"""Every error that a user can cause or meet. One message has the problem, found, expected, and what to do."""

from __future__ import annotations

from apollo_sft.redact import redact


class ApolloError(Exception):
    """Base of all errors shown to users as one message instead of a traceback.

    `what` names the key, or the file and row; the rest is optional and printed one per line.
    """

    exit_code = 1

    def __init__(self, what: str, *, found: object = None, expected: object = None, fix: str | None = None) -> None:
        lines = [what]
        if found is not None:
            lines.append(f"  found:    {found}")
        if expected is not None:
            lines.append(f"  expected: {expected}")
        if fix is not None:
            lines.append(f"  to do:    {fix}")
        super().__init__(redact("\n".join(lines)))


class ConfigError(ApolloError):
    """A key, a value or a combination of keys that cannot be run."""

    exit_code = 2


class DataError(ApolloError):
    """A data file, row, column, template or tokenizer that cannot be trained on."""

    exit_code = 2


class TopologyError(ApolloError):
    """Ranks, devices or mesh sizes that do not fit the machine or the model."""

    exit_code = 2


class ModelError(ApolloError):
    """A model folder or an architecture that cannot be trained exactly."""

    exit_code = 2


class CheckpointError(ApolloError):
    """A run folder, a checkpoint or an exported model that cannot be used, written or verified."""


class BaseFilesError(CheckpointError):
    """Files of the base model that are no longer where they were: the trained weights are not the problem."""


class UploadError(ApolloError):
    """The run is finished and its model complete, but it was not copied to `trainer.default_hdfs_dir`."""

    exit_code = 3


class AlreadyDone(ApolloError):  # noqa: N818 - it is no error: nothing is left to do
    """The run is complete under the same configuration."""

    exit_code = 0


class Preempted(ApolloError):  # noqa: N818 - the run can be resumed
    """A signal ended the run; its state is saved, and the same command resumes it."""

    exit_code = 75


class Stopped(BaseException):
    """A signal, raised in the main thread. Not an Exception, so that no library handles it as a failure of its own."""

    exit_code = Preempted.exit_code


class TrainingError(ApolloError):
    """A run that had to stop: a loss or a gradient that is not finite."""


def message_of(error: BaseException) -> str:
    """Return the message of an error, and below it its notes: the stage of the run, if it was noted."""
    return "\n".join([str(error), *(f"  {note}" for note in getattr(error, "__notes__", ()))])

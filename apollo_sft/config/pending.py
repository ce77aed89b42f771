"""Keys whose feature is not built yet: one line each, to be deleted with the feature."""

from __future__ import annotations

from collections.abc import Callable

from apollo_sft.config.schema import SftConfig
from apollo_sft.errors import ConfigError

PENDING: list[tuple[str, Callable[[SftConfig], bool], str]] = [
    ("model.strategy", lambda c: c.model.strategy == "fsdp", "model.strategy=fsdp2"),
    ("model.use_liger", lambda c: c.model.use_liger, "leave it false"),
    ("data.custom_cls.path", lambda c: c.data.custom_cls.path is not None, "write the rows as parquet"),
    ("data.bad_rows=skip", lambda c: c.data.bad_rows == "skip", "data.bad_rows=error, and mend the rows it names"),
    (
        "trainer.resume_mode=resume_path",
        lambda c: c.trainer.resume_mode == "resume_path" or c.trainer.resume_from_path is not None,
        "start from an exported model with model.partial_pretrain",
    ),
    (
        "trainer.save_freq in minutes",
        lambda c: isinstance(c.trainer.save_freq, str) and c.trainer.save_freq != "epoch",
        "trainer.save_freq=-1 or epoch for the ends of epochs, or a number of steps",
    ),
    (
        "trainer.checkpoint.save_contents",
        lambda c: c.trainer.checkpoint.save_contents != ("model", "optimizer", "extra"),
        "leave it out; the model itself is written once, at the end of the run",
    ),
    ("trainer.generate_samples", lambda c: c.trainer.generate_samples > 0, "leave it 0"),
    ("trainer.default_hdfs_dir", lambda c: c.trainer.default_hdfs_dir is not None, "copy the finished folder yourself"),
]
"""(key, whether the config uses it, what to do instead)."""


def refuse_pending(config: SftConfig) -> None:
    """Raises: ConfigError naming every key in use whose feature is not there."""
    problems = [
        str(ConfigError(f"{key} is not built yet", fix=instead)) for key, used, instead in PENDING if used(config)
    ]
    if problems:
        raise ConfigError("\n".join(problems))

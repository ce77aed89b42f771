"""What the config alone shows to be impossible, and the paths that it names. No torch, no data is opened."""

from __future__ import annotations

import difflib
import glob
import importlib.util
from pathlib import Path

from apollo_sft.config.schema import SftConfig
from apollo_sft.errors import ConfigError

LOGGERS = ("console", "tensorboard", "wandb", "file")
LATER_LOGGERS = ("mlflow", "swanlab", "trackio")


def check_combinations(config: SftConfig, given: set[str], notes: list[str]) -> None:
    """`given`: the keys that the user has set. Adds to `notes` what is accepted but should be known.

    Raises: ConfigError.
    """
    _check_batches(config)
    _check_precision(config, notes)
    _check_loggers(config)
    if config.optim.lr_warmup_steps >= 0 and "optim.warmup_steps_ratio" in given:
        raise ConfigError(
            "optim.lr_warmup_steps and optim.warmup_steps_ratio both say how long the warm-up is",
            fix="give one of them",
        )
    if given & {"data.train_files"} and "data.val_files" not in given and config.data.val_files:
        raise ConfigError(
            "data.train_files is yours, but data.val_files is still the default",
            found=", ".join(config.data.val_files),
            expected="validation data that belongs to the training data",
            fix="set data.val_files, or data.val_files=null to train without validation",
        )
    if not config.data.train_files:
        raise ConfigError("data.train_files names no file", fix="data.train_files=path/to/train.parquet")
    if config.use_remove_padding:
        notes.append("use_remove_padding changes nothing: there never is padding")


def check_paths(config: SftConfig, given: set[str]) -> None:
    """Local files that the config names must exist. `given`: the keys that the user has set.

    Raises: ConfigError naming the key.
    """
    for key, paths, off in (
        ("data.train_files", config.data.train_files, "data.train_files=path/to/train.parquet"),
        ("data.val_files", config.data.val_files, "data.val_files=null, or data.val_files=path/to/val.parquet"),
    ):
        for path in paths:
            if "://" not in path and not _exists(path):
                raise ConfigError(f"{_named(key, given)}: no such file", found=path, fix=off)
    model = config.model.partial_pretrain
    if Path(model).is_absolute() and not Path(model).is_dir():
        key = _named("model.partial_pretrain", given)
        fix = "model.partial_pretrain=path/to/model, or a hub id such as Qwen/Qwen2.5-0.5B-Instruct"
        raise ConfigError(f"{key}: no such folder", found=model, fix=fix)
    external = config.model.external_lib
    if external is not None and importlib.util.find_spec(external.partition(".")[0]) is None:
        raise ConfigError("model.external_lib cannot be found", found=external, expected="a module on PYTHONPATH")


def _named(key: str, given: set[str]) -> str:
    return key if key in given else f"{key} (its default)"


def _exists(path: str) -> bool:
    return Path(path).exists() or bool(glob.has_magic(path) and glob.glob(path, recursive=True))  # noqa: PTH207


def _check_batches(config: SftConfig) -> None:
    data = config.data
    if data.micro_batch_size_per_gpu > data.train_batch_size:
        raise ConfigError(
            "data.micro_batch_size_per_gpu is larger than data.train_batch_size",
            found=f"{data.micro_batch_size_per_gpu} samples a forward, {data.train_batch_size} samples a step",
            fix=f"data.micro_batch_size_per_gpu={data.train_batch_size} or less",
        )
    if data.max_token_len_per_gpu is not None and not data.use_dynamic_bsz:
        raise ConfigError(
            "data.max_token_len_per_gpu has an effect only with data.use_dynamic_bsz=true",
            found=data.max_token_len_per_gpu,
            fix="data.max_token_len_per_gpu=null",
        )
    for key, value in (("train_max_samples", data.train_max_samples), ("val_max_samples", data.val_max_samples)):
        if value == 0:
            raise ConfigError(f"data.{key} is 0: there would be no row", expected="-1 for all rows, or 1 and more")
    if config.trainer.test_freq == 0:
        raise ConfigError("trainer.test_freq is 0", expected="-1 for the ends of epochs, or a number of steps")


def _check_precision(config: SftConfig, notes: list[str]) -> None:
    master, compute = config.model.fsdp_config.model_dtype, config.model.fsdp_config.dtype
    allowed = {"fp64": ("auto", "fp64"), "fp32": ("auto", "fp32", "bf16"), "bf16": ("auto", "bf16")}[master]
    if compute not in allowed:
        raise ConfigError(
            "model.fsdp_config.dtype does not go with model.fsdp_config.model_dtype",
            found=f"dtype={compute}, model_dtype={master}",
            expected=f"dtype={' or '.join(allowed)} with model_dtype={master}",
        )
    if master == "bf16":
        notes.append(
            "warning: model.fsdp_config.model_dtype=bf16 loses small updates: at lr 1e-5 most weights of usual size "
            "do not move at all; fp32 is the safe choice"
        )


def _check_loggers(config: SftConfig) -> None:
    for name in config.trainer.logger:
        if name in LATER_LOGGERS:
            raise ConfigError(f"trainer.logger: {name} is not built yet", fix=f"one of {', '.join(LOGGERS)}")
        if name not in LOGGERS:
            close = difflib.get_close_matches(name, LOGGERS, n=1)
            fix = f"did you mean {close[0]}?" if close else None
            raise ConfigError("trainer.logger is unknown", found=name, expected=", ".join(LOGGERS), fix=fix)

"""Find what a person names on a command line: the run that a folder belongs to, its configuration, a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from apollo_sft.checkpoint import publish
from apollo_sft.checkpoint.run_folder import resume
from apollo_sft.checkpoint.run_folder.folder import read_run
from apollo_sft.config.compose import compose, validate
from apollo_sft.config.schema import DataConfig, SftConfig
from apollo_sft.errors import ConfigError


def find_run(folder: Path) -> Path | None:
    """Find the run folder that a model folder is, or is in as `checkpoints/step_N/hf`; None when no run wrote it."""
    path = folder.expanduser().resolve()
    candidates = [path, *path.parents[:3]]
    return next((candidate for candidate in candidates if read_run(candidate) is not None), None)


def find_base(source: str) -> Path | None:
    """Find the folder of a base model as a user names it: a folder, or a hub id in the cache; None for neither."""
    from huggingface_hub import snapshot_download

    if Path(source).is_dir():
        return Path(source)

    try:
        return Path(snapshot_download(source, local_files_only=True))
    except (OSError, ValueError):  # it is no hub id, or not in the cache
        return None


def read_config(run: Path) -> SftConfig:
    """Read the whole configuration of a run. Raises: ConfigError as `read_training`."""
    return config_of(_read(run))


def read_training(run: Path) -> tuple[DataConfig, str]:
    """Return the data section of a run's configuration, and its base model as the user named it.

    Other sections are not validated: a tool that needs these two still opens a run of an earlier version.
    Raises: ConfigError when config.yaml is missing, or of a version with other keys.
    """
    raw = _read(run)
    return config_of({"data": raw["data"]}).data, str(raw["model"]["partial_pretrain"])


def _read(run: Path) -> dict[str, Any]:
    path = run / "config.yaml"
    try:
        raw: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
        if not isinstance(raw["data"], dict) or "partial_pretrain" not in raw["model"]:
            raise ValueError("no configuration of a training")
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} cannot be read", found=f"{type(error).__name__}: {error}") from error

    return raw


def config_of(saved: Mapping[str, Any]) -> SftConfig:
    """Validate a saved configuration, perhaps of a version that lacked some keys: they get their defaults.

    Raises: ConfigError.
    """
    defaults = compose(["data.train_files=train.parquet", "data.val_files=null"]).config.model_dump(mode="json")
    return validate(_completed(saved, defaults))


def _completed(saved: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    completed = dict(defaults)
    for key, value in saved.items():
        completed[key] = value
        # An empty default is a mapping whose keys are the user's own: there is nothing to fill in.
        if isinstance(value, dict) and defaults.get(key):
            completed[key] = _completed(value, defaults[key])
    return completed


def find_checkpoint(path: Path, which: str) -> Path:
    """Return `path` when it is a checkpoint, else the one of the run folder `path` that `which` names.

    `which`: latest, best, or the number of a step.
    Raises: ConfigError naming what there is.
    """
    folder = path.expanduser().resolve()
    if (folder / resume.STATE).is_file():
        return folder

    checkpoints = folder / "checkpoints"
    there = [found.name for found in resume.whole_checkpoints(checkpoints)]
    if not there:
        raise ConfigError(
            f"{path} is neither a checkpoint nor a run folder with checkpoints",
            expected="a folder such as RUN/checkpoints/step_000200, or RUN itself",
        )

    name = which
    if which.isdecimal():
        name = resume.folder_of(checkpoints, int(which)).name

    found = checkpoints / name
    # A link is followed only to a complete checkpoint beside it, not to anywhere.
    if name in there or (found.is_symlink() and found.resolve().name in there):
        return found.resolve()

    listed = ", ".join(sorted(there))
    if which == resume.BEST:
        listed += "; trainer.save_best_on keeps the best"

    raise ConfigError(
        f"the run in {path} has no checkpoint {which}",
        found=listed,
        expected="latest, best, or the number of a step",
    )


def trained_stops(run: Path | None) -> tuple[int, ...] | None:
    """Read the tokens that ended the trained turns of a run, most frequent first; None when there is no record."""
    if run is None or not (run / "data_audit.json").is_file():
        return None
    stops = publish.read_json(run / "data_audit.json").get("train", {}).get("stop_tokens", {})
    return tuple(int(token) for token in stops)

"""What a person names, found: the run that a model folder belongs to, and a checkpoint of a run."""

from __future__ import annotations

from pathlib import Path

import yaml

from apollo_sft.checkpoint.layout import read_run
from apollo_sft.config.compose import validate
from apollo_sft.config.schema import SftConfig
from apollo_sft.errors import ConfigError


def find_run(folder: Path) -> Path | None:
    """The run folder that a model folder is, or lies in as `checkpoints/step_N/hf`; None when no run wrote it."""
    path = folder.expanduser().resolve()
    candidates = [path, *path.parents[:3]]
    return next((candidate for candidate in candidates if read_run(candidate) is not None), None)


def read_config(run: Path) -> SftConfig:
    """The configuration of a run, as it was resolved then.

    Raises: ConfigError when config.yaml is missing, or of a version with other keys.
    """
    path = run / "config.yaml"
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} cannot be read", found=error) from error
    if not isinstance(raw, dict):
        raise ConfigError(f"{path} is no configuration of a run", found=type(raw).__name__)
    return validate(raw)

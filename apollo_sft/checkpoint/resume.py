"""Checkpoints on disk: which is the newest whole one, and whether a run may go on from it."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from apollo_sft.checkpoint import publish
from apollo_sft.errors import CheckpointError, ConfigError

NAME = re.compile(r"step_(\d{6,})")
FREE = [
    "trainer.default_local_dir",
    "trainer.default_hdfs_dir",
    "trainer.project_name",
    "trainer.experiment_name",
    "trainer.logger",
    "trainer.log_freq",
    "trainer.save_freq",
    "trainer.test_freq",
    "trainer.val_before_train",
    "trainer.resume_mode",
    "trainer.resume_from_path",
    "trainer.max_ckpt_to_keep",
    "trainer.checkpoint.",
    "trainer.export",
    "trainer.export_dtype",
    "trainer.generate_samples",
    "trainer.nnodes",
    "trainer.n_gpus_per_node",
    "trainer.device",
    "data.val_files",
    "data.val_max_samples",
    "data.store_dir",
    "data.train_files",
    "data.micro_batch_size_per_gpu",
    "data.use_dynamic_bsz",
    "data.max_token_len_per_gpu",
    "data.balance_dp_token",
    "model.strategy",
    "model.enable_gradient_checkpointing",
    "model.attn_implementation",
    "model.fsdp_config.wrap_policy.",
    "model.fsdp_config.cpu_offload",
    "model.fsdp_config.offload_params",
    "model.fsdp_config.fsdp_size",
    "model.fsdp_config.reshard_after_forward",
    "model.fsdp_config.use_no_sync_for_gradient_accumulation",
    "ulysses_sequence_parallel_size",
    "use_remove_padding",
]
"""Keys that change neither the samples of a step nor the model; a dot at the end means all below.

Where the training data lie is free as well: their content is compared by the token store.
"""


def folder_of(checkpoints: Path, step: int) -> Path:
    return checkpoints / f"step_{step:06}"


def whole_checkpoints(checkpoints: Path) -> Iterator[Path]:
    """Folders with a manifest, the newest first. One without was never finished and does not count."""
    found = [path for path in checkpoints.glob("step_*") if NAME.fullmatch(path.name) and path.is_dir()]
    for path in sorted(found, key=lambda path: int(path.name.removeprefix("step_")), reverse=True):
        if (path / publish.DIRECTORY_MANIFEST).is_file():
            yield path


def newest_checkpoint(checkpoints: Path, notes: list[str]) -> Path | None:
    """The newest checkpoint whose files are what its manifest says; damaged ones are named in `notes`."""
    for path in whole_checkpoints(checkpoints):
        try:
            check_files(path)
        except CheckpointError as error:
            notes.append(f"passed over a damaged checkpoint: {error}")
        else:
            return path
    return None


def check_files(folder: Path) -> None:
    """Compare size and sha256 of every file with the manifest.

    Raises: CheckpointError naming the first that differs.
    """
    try:
        listed = json.loads((folder / publish.DIRECTORY_MANIFEST).read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder / publish.DIRECTORY_MANIFEST} cannot be read", found=error) from error
    for name, facts in listed.items():
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"{path} is missing")
        found = publish.describe_file(path)
        if found != facts:
            raise CheckpointError(f"{path} is not what was written", found=found, expected=facts)


def prune(checkpoints: Path, keep: int) -> None:
    """Remove the oldest whole checkpoints beyond `keep`. What has no manifest of ours is left alone."""
    for path in list(whole_checkpoints(checkpoints))[keep:]:
        (path / publish.DIRECTORY_MANIFEST).unlink()  # first: half a folder must not look like a checkpoint
        shutil.rmtree(path)


def check_same_run(root: Path, present: Mapping[str, Any]) -> None:
    """Compare the config of the run in `root` with the present one.

    Raises: ConfigError listing what would change the samples or the model.
    """
    path = root / "config.yaml"
    saved = _flat(yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else {})
    now = _flat(yaml.safe_load(yaml.safe_dump(dict(present))))
    changed = [key for key in sorted(saved.keys() | now.keys()) if saved.get(key) != now.get(key) and not _free(key)]
    if changed:
        lines = [f"{key}: {saved.get(key)} then, {now.get(key)} now" for key in changed]
        raise ConfigError(
            f"trainer.default_local_dir={root} holds a run of another configuration",
            found="; ".join(lines),
            expected="the same, to go on with it",
            fix="set these keys back; or trainer.resume_mode=disable, which moves that run to previous-<time>/; "
            "or another trainer.default_local_dir",
        )


def _free(key: str) -> bool:
    return any(key == free or (free.endswith(".") and key.startswith(free)) for free in FREE)


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, dict) and value:
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat

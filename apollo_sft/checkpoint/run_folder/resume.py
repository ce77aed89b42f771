"""Checkpoints on disk: which is the newest complete one, and whether a run may resume from it."""

from __future__ import annotations

import os
import re
import shutil
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from apollo_sft.checkpoint import publish
from apollo_sft.config.compose import defaults
from apollo_sft.config.keys import MODEL, NUMERICS, ORDER, TOKENS
from apollo_sft.config.overrides import leaves
from apollo_sft.config.schema import KEYS
from apollo_sft.errors import CheckpointError, ConfigError

STATE = "state.json"
PARTS = ("model", "optimizer", "extra")
"""What a run needs to resume: weights, moments, and random states with the number of steps."""
LATEST = "latest"
BEST = "best"
"""Links beside the checkpoints."""
NAME = re.compile(r"step_(\d{6,})")
COMPARED = TOKENS | ORDER | MODEL | NUMERICS
"""What a resumed run must keep: the samples of a step, the model and its updates. Layout and length may change."""


def folder_of(checkpoints: Path, step: int) -> Path:
    """Return the folder of the checkpoint of a step."""
    return checkpoints / f"step_{step:06}"


def whole_checkpoints(checkpoints: Path) -> Iterator[Path]:
    """Yield the complete checkpoints, the newest first: folders with a manifest, which is written last. No links."""
    named = [path for path in checkpoints.glob("step_*") if NAME.fullmatch(path.name)]
    found = [path for path in named if path.is_dir() and not path.is_symlink()]

    for path in sorted(found, key=lambda path: int(path.name.removeprefix("step_")), reverse=True):
        if (path / publish.DIRECTORY_MANIFEST).is_file():
            yield path


def newest_checkpoint(checkpoints: Path, notes: list[str]) -> Path | None:
    """Return the newest checkpoint whose files match its manifest; damaged ones are named in `notes`."""
    for path in whole_checkpoints(checkpoints):
        try:
            check_files(path)
            facts = read_facts(path)
            if folder_of(checkpoints, facts["step"]) != path:
                raise CheckpointError(f"{path} holds the state of another step", found=facts["step"])
            resumable = set(PARTS) <= set(facts["contents"])
        except CheckpointError as error:
            notes.append(f"skipped a damaged checkpoint: {error}")
            continue

        if resumable:
            _warn_of_others(path, notes)
            return path

        notes.append(f"skipped {path.name}: trainer.checkpoint.save_contents left out what resuming needs")

    return None


def read_facts(folder: Path) -> dict[str, Any]:
    """Read state.json of a checkpoint. Raises: CheckpointError."""
    facts = publish.read_json(folder / STATE)
    missing = {"step", "contents", "config", "data"} - facts.keys()
    if missing:
        raise CheckpointError(f"{folder / STATE} is not one of ours", found=f"no {', '.join(sorted(missing))}")
    return facts


def check_files(folder: Path) -> None:
    """Compare size and sha256 of every file with the manifest.

    Raises: CheckpointError naming the first that differs.
    """
    try:
        listed = dict(publish.read_json(folder / publish.DIRECTORY_MANIFEST)["files"])
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{folder / publish.DIRECTORY_MANIFEST} cannot be read", found=error) from error

    missing = [folder / name for name in listed if not (folder / name).is_file()]
    if missing:
        raise CheckpointError(f"{missing[0]} is missing")

    found = publish.describe_files(folder)
    for name, facts in listed.items():
        if found.get(name) != facts:
            raise CheckpointError(f"{folder / name} is not what was written", found=found.get(name), expected=facts)

    # DCP reads every safetensors file of the folder, so one that is too much would be read as a part of the state.
    added = sorted(name for name in found.keys() - listed.keys() if name.endswith((".safetensors", STATE)))
    if added:
        raise CheckpointError(
            f"unexpected file {folder / added[0]} in the checkpoint: it is not in the manifest and would be loaded"
        )


def _warn_of_others(folder: Path, notes: list[str]) -> None:
    """Note when other users can write, or wrote, a checkpoint. Hashes do not show that: they could be rewritten too."""
    for path in (folder, *folder.rglob("*")):
        facts = path.lstat()
        if facts.st_mode & stat.S_IWOTH and not path.is_symlink():
            reason = "can be written by every user"
        elif facts.st_uid != os.geteuid():
            reason = f"belongs to another user (id {facts.st_uid})"
        else:
            continue

        notes.append(f"warning: {path} {reason}; resume from it only if you trust its content")
        return


def prune(checkpoints: Path, keep: int) -> None:
    """Remove the oldest complete checkpoints beyond `keep`, but not the best one, and nothing that we did not write."""
    best = checkpoints / BEST
    spared = best.resolve() if best.is_symlink() else None

    for path in list(whole_checkpoints(checkpoints))[keep:]:
        if path.resolve() == spared:
            continue
        (path / publish.DIRECTORY_MANIFEST).unlink()  # first: half a folder must not look like a checkpoint
        shutil.rmtree(path)


def fork_point(path: str, present: Mapping[str, Any], allow_changes: bool, notes: list[str]) -> Path:
    """Return the checkpoint at `path`, of any run, once it is checked: its files, and its configuration.

    Raises: ConfigError, CheckpointError.
    """
    folder = Path(path).expanduser().absolute().resolve()
    if not (folder / publish.DIRECTORY_MANIFEST).is_file():
        raise ConfigError(
            f"trainer.resume_from_path={path} is no checkpoint",
            expected="a folder such as checkpoints/step_000200 of an earlier run, or checkpoints/latest",
        )

    check_files(folder)
    _warn_of_others(folder, notes)
    check_same(read_facts(folder)["config"], present, f"trainer.resume_from_path={path}", allow_changes, notes)
    return folder


def check_newest(path: str, newest: Path | None, root: Path) -> None:
    """Raise a ConfigError unless `path` is the newest checkpoint of the run in `root`.

    A run resumes from its own newest checkpoint only. From any other one, a new run begins, in another folder.
    """
    if newest is None or Path(path).expanduser().resolve() != newest.resolve():
        raise ConfigError(
            f"trainer.resume_from_path={path} is not the newest checkpoint of the run in {root}",
            found=f"its newest complete checkpoint is {newest.name if newest else 'none'}",
            fix="trainer.resume_mode=auto resumes that run; another trainer.default_local_dir begins a run of its own "
            "at that checkpoint",
        )


def check_same(
    saved: Mapping[str, Any], present: Mapping[str, Any], where: str, allow_changes: bool, notes: list[str]
) -> None:
    """Compare the config of an earlier run with the present one; list what differs in `notes`.

    Raises: ConfigError, unless `allow_changes`, listing what would change the samples or the model.
    """
    # Written and read back, so that both are compared as YAML holds them, for example tuples as lists.
    now = dict(leaves(yaml.safe_load(yaml.safe_dump(dict(present)))))
    then = dict(leaves(saved))

    # An earlier version wrote its config without the keys that are new since then: it ran with their defaults.
    then = {key: value for key, value in leaves(defaults()) if key in now} | then
    changed = [key for key in sorted(then.keys() | now.keys()) if then.get(key) != now.get(key)]
    lines = {key: f"{key}: {then.get(key)} then, {now.get(key)} now" for key in changed}

    grave = [lines[key] for key in changed if not _is_free(key)]
    if grave and not allow_changes:
        raise ConfigError(
            f"{where} holds a run of another configuration",
            found="; ".join(grave),
            expected="the same configuration, to resume that run",
            fix="set these keys back; or trainer.resume_mode=disable, which moves that run to previous-<time>/; "
            "or another trainer.default_local_dir; or trainer.resume_with_changes=true, if you know what you do",
        )

    if lines:
        notes.append("changed since then: " + "; ".join(lines.values()))


def _is_free(name: str) -> bool:
    """Return whether a run may resume with another value of a key. A key that the schema does not know is not free."""
    key = KEYS.get(name)
    return key is not None and (key.by_content or not key.changes & COMPARED)

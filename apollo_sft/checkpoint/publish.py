"""The one way a folder becomes visible: staged in a hidden folder, synced, checked, then moved.

A kill at any point leaves the old content or, after `recover`, the new content; never a mixture that loads. A model
that replaces an earlier one in `R` goes through these states:

    R/config.json, R/a.safetensors                      the earlier model, with R/.apollo-model.json listing its files
    R/.apollo-incoming-model/{config.json,b.safetensors}   the new one: written, synced, re-read. A kill here drops it
    R/.apollo-publish.json                              the journal: from here on a kill is followed by finishing it
    R/b.safetensors                                     config.json and a.safetensors removed, b moved: nothing loads
    R/config.json                                       moved last, then the journal becomes .apollo-model.json

Source: Pillai et al., "All File Systems Are Not Created Equal", OSDI 2014 (sync the file, rename, sync the folder).
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apollo_sft.errors import CheckpointError

PREFIX = ".apollo-"
STAGING_PREFIX = PREFIX + "incoming-"
JOURNAL = PREFIX + "publish.json"
MANIFEST = PREFIX + "model.json"
"""A list of the model files of this folder that we wrote. A file that it does not name is never replaced or removed."""
DIRECTORY_MANIFEST = PREFIX + "files.json"
HASHING_THREADS = min(8, os.cpu_count() or 1)
LAST = "config.json"
"""The file that makes a model folder loadable: removed first, moved last."""


@dataclass(frozen=True, slots=True)
class Move:
    """A move that was decided, as the journal has it."""

    staging: str
    """The name of the hidden folder with the new model."""
    files: dict[str, dict[str, Any]]
    """Size and sha256 of each file of the new model, by its path in the folder."""
    stale: list[str]
    """Files of the earlier model that the new one does not replace."""


def staging_folder(folder: Path, name: str) -> Path:
    """Make an empty hidden sub-folder of `folder` to write into, in place of one that an unfinished write left."""
    staging = folder / f"{STAGING_PREFIX}{name}"
    if staging.exists():
        shutil.rmtree(staging)
    staging.mkdir(parents=True)
    return staging


def publish_model(staging: Path, folder: Path, check: Callable[[Path], None]) -> None:
    """Replace the model in `folder` by the one in `staging` inside it. `check` re-reads what was written.

    Raises: CheckpointError from `check`, or when a file that is not ours is in the way: the complete model is then in
    a sub-folder that the message names.
    """
    sync_tree(staging)
    check(staging)
    files = describe_files(staging)
    assert LAST in files, f"a model has a {LAST}"

    ours = _listed_files(folder / MANIFEST)
    foreign = sorted(name for name in files if _is_taken(folder, name, ours))
    if foreign:
        aside = folder / time.strftime("model-%Y%m%d-%H%M%S")
        publish_directory(staging, aside)
        raise CheckpointError(
            f"{folder} holds files with the names of model files that we did not write",
            found=", ".join(foreign[:5]),
            fix=f"nothing was overwritten; the complete model is in {aside}",
        )

    # From the journal on, a kill no longer loses the new model: `recover` finishes the move.
    stale = sorted(name for name in set(ours) - set(files) if not _leads_away(folder, name))
    move = Move(staging.name, files, stale)
    _write_json(folder / JOURNAL, {"staging": move.staging, "files": move.files, "stale": move.stale})
    _finish(folder, move)


def publish_directory(staging: Path, final: Path) -> None:
    """Make the folder `staging` visible as the new folder `final`, on the same file system, by one rename.

    Raises: CheckpointError when `final` exists.
    """
    if os.path.lexists(final):
        raise CheckpointError(f"{final} exists already", expected="a name that is free")
    sync_tree(staging)
    _write_json(staging / DIRECTORY_MANIFEST, {"files": describe_files(staging)})
    staging.rename(final)
    sync_folder(final.parent)


def recover(folder: Path) -> list[str]:
    """Finish a move that was decided and remove one that was not. Called at every start; touch no files of others.

    Return what was done, in words, for the log.
    Raises: CheckpointError when the files of a decided move are damaged.
    """
    done = []

    if (folder / JOURNAL).is_file():
        move = _read_move(folder / JOURNAL)
        _check_complete(folder, move)
        _finish(folder, move)
        done.append("finished an interrupted move of the model into place")

    for path in sorted(folder.glob(f"{STAGING_PREFIX}*")):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
            done.append(f"removed {path.name}, the beginning of a save that was interrupted")

    for path in sorted(folder.glob(f"{PREFIX}*.tmp")):
        path.unlink()

    return done


def _finish(folder: Path, move: Move) -> None:
    """Carry out a move, of which any number of steps may have been done before: recovery repeats it."""
    staging = folder / move.staging

    # While the staging folder has this file, the one in `folder`, if any, is the earlier model's. It goes first, and
    # every step is synced before the next, so that no mixture of two models loads after a power loss.
    if (staging / LAST).exists():
        (folder / LAST).unlink(missing_ok=True)
        sync_folder(folder)

        for name in move.stale:
            if not _leads_away(folder, name):
                (folder / name).unlink(missing_ok=True)
                _remove_empty(folder, name)

        for name in sorted(set(move.files) - {LAST}):
            move_file(staging, folder, name)

        sync_folder(folder)

        (staging / LAST).replace(folder / LAST)
        sync_folder(folder)

    (folder / JOURNAL).replace(folder / MANIFEST)
    sync_folder(folder)
    shutil.rmtree(staging, ignore_errors=not staging.exists())


def move_file(source: Path, target: Path, name: str) -> None:
    """Move a file, by its path in the folder, to the same place in another one, where it is not there already."""
    if not os.path.lexists(source / name) or _leads_away(source, name):
        return

    (target / name).parent.mkdir(parents=True, exist_ok=True)
    (source / name).replace(target / name)
    for inside in Path(name).parents[:-1]:
        sync_folder(target / inside)

    _remove_empty(source, name)


def _remove_empty(folder: Path, name: str) -> None:
    """Remove the folders that a file leaves empty, up to `folder`."""
    for inside in Path(name).parents[:-1]:
        if (folder / inside).is_dir() and not any((folder / inside).iterdir()):
            (folder / inside).rmdir()


def _is_taken(folder: Path, name: str, ours: Mapping[str, Any]) -> bool:
    """Return whether something that is not ours is where a model file must go."""
    return (name not in ours and os.path.lexists(folder / name)) or _leads_away(folder, name)


def _is_inside(name: str) -> bool:
    """Return whether a path names a file below its folder, in the one normal way of writing it."""
    path = Path(name)
    return not path.is_absolute() and ".." not in path.parts and path.as_posix() == name and name not in ("", ".")


def _leads_away(folder: Path, name: str) -> bool:
    """Return whether a folder on the way to a file is a link, or no folder."""
    above = [folder / inside for inside in Path(name).parents[:-1]]
    return any(path.is_symlink() or (path.exists() and not path.is_dir()) for path in above)


def _check_complete(folder: Path, move: Move) -> None:
    for name, facts in move.files.items():
        path = folder / move.staging / name
        if not path.exists():  # it was moved before the kill
            path = folder / name

        if not path.is_file() or describe_file(path) != facts:
            raise CheckpointError(
                f"{folder}: a save was interrupted and cannot be finished, because {name} is missing or damaged",
                fix=f"move {JOURNAL} and {move.staging} out of {folder}, then start again",
            )


def _read_move(journal: Path) -> Move:
    """Read the journal. Raises: CheckpointError for one that we cannot have written.

    Its names decide which files are removed and replaced: a forged one must not reach out of the folder.
    """
    content = read_json(journal)
    try:
        move = Move(content["staging"], content["files"], content["stale"])
    except KeyError as error:
        raise CheckpointError(f"{journal} is not a journal of ours", found=f"no {error}") from error

    names = [move.staging, *move.files, *move.stale]
    outside = [name for name in names if not _is_inside(name) or _leads_away(journal.parent, name)]
    if outside or not move.staging.startswith(STAGING_PREFIX) or "/" in move.staging:
        raise CheckpointError(f"{journal} is not a journal of ours", found=outside or move.staging)
    return move


def model_files(folder: Path) -> list[str]:
    """List the paths in `folder` of the model that was, or is being, published there: config.json first, the list last.

    Empty when there is no model.
    """
    names = {**_listed_files(folder / MANIFEST), **_listed_files(folder / JOURNAL)}
    if not names:
        return []
    return [*sorted(names, key=lambda name: (name != LAST, name)), MANIFEST]


def _listed_files(manifest: Path) -> Mapping[str, Any]:
    if not manifest.is_file():
        return {}
    files: dict[str, Any] = read_json(manifest).get("files", {})
    return {name: facts for name, facts in files.items() if _is_inside(name)}


def describe_files(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the size in bytes and the sha256 of every file below `folder`, by relative name."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    names = [path.relative_to(folder).as_posix() for path in paths]
    with ThreadPoolExecutor(HASHING_THREADS) as pool:
        return dict(zip(names, pool.map(describe_file, paths), strict=True))


def describe_file(path: Path) -> dict[str, Any]:
    """Return the size in bytes and the sha256 of a file."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"size": path.stat().st_size, "sha256": digest}


def write_durably(path: Path, text: str) -> None:
    """Write a text file in one step that survives a power loss: the old content or the new, never a part."""
    temporary = path.with_name(f"{PREFIX}{path.name.removeprefix(PREFIX)}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())

    temporary.replace(path)
    sync_folder(path.parent)


def point(pointer: Path, target: str) -> None:
    """Make the link `pointer` lead to `target`, a name in its own folder, in one step: it is never missing."""
    if pointer.is_symlink() and os.readlink(pointer) == target:  # noqa: PTH115 - as it was written
        return

    temporary = pointer.with_name(f"{PREFIX}{pointer.name}.tmp")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target)
    temporary.replace(pointer)
    sync_folder(pointer.parent)


def sync_tree(folder: Path) -> None:
    """Make every file below `folder`, and the folders themselves, survive a power loss."""
    for path in sorted(folder.rglob("*"), reverse=True):
        if path.is_file():
            sync_file(path)
        elif path.is_dir():
            sync_folder(path)
    sync_folder(folder)


def sync_file(path: Path) -> None:
    """Make the content of a file survive a power loss."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Make the names in a folder survive a power loss: what was created, renamed or removed in it."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems cannot sync a folder: there is nothing more that a program could do.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    write_durably(path, json.dumps(content, indent=1) + "\n")


def json_object(path: Path) -> dict[str, Any] | None:
    """Read a JSON file that may be missing, damaged or of somebody else: None when it holds no JSON object."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file that must be there. Raises: CheckpointError when it holds no JSON object."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read", found=error) from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON", found=error) from error

    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is not a JSON object", found=type(content).__name__)
    return content

"""Moving an earlier run aside, to `previous-<time>/`, in steps that a kill at any point leaves repeatable.

A run in `R` that is archived at noon goes through three states:

    R/run.json, R/config.json, ...               before
    R/.apollo-previous-20260101-120000/...       files move one by one; the next start continues from here
    R/previous-20260101-120000/run.json, ...     one rename, when all of them have moved
"""

from __future__ import annotations

import time
from pathlib import Path

from apollo_sft.checkpoint import publish
from apollo_sft.checkpoint.run_folder.folder import ARCHIVING_PREFIX, OWN_NAMES, RUN_JSON, is_kept


def archive_run(root: Path) -> Path:
    """Move the run in `root` to `previous-<time>/`, by way of a hidden folder. Return the folder that it is in then."""
    name = time.strftime("previous-%Y%m%d-%H%M%S")
    taken = len([path for path in root.iterdir() if path.name.startswith(name)])
    final = name if not taken else f"{name}-{taken + 1}"

    # The hidden folder must survive a power loss before the first file moves: it is what the next start looks for.
    hidden = root / f"{publish.PREFIX}{final}"
    hidden.mkdir()
    publish.sync_folder(root)
    return _move_run(root, hidden)


def finish_archiving(root: Path) -> list[str]:
    """Finish what a kill interrupted. Return what was done, in words, for the log."""
    return [
        f"finished moving an earlier run to {_move_run(root, hidden).name}/"
        for hidden in sorted(root.glob(f"{ARCHIVING_PREFIX}*"))
        if hidden.is_dir() and not hidden.is_symlink()
    ]


def _move_run(root: Path, hidden: Path) -> Path:
    files = publish.model_files(root)
    aside = [path.name for path in root.glob("model-*") if is_kept(path)]

    # config.json is the first of the model's files, so that no half of a model loads. The lists of what is ours come
    # late and run.json last: until they have moved, a repeated call still knows which files belong to the run.
    for name in [*files[:-1], *sorted(OWN_NAMES - {RUN_JSON}), *aside, *files[-1:], RUN_JSON]:
        if name in (publish.MANIFEST, RUN_JSON):
            publish.sync_folder(hidden)
        publish.move_file(root, hidden, name)

    final = root / hidden.name.removeprefix(publish.PREFIX)
    publish.sync_folder(hidden)
    hidden.rename(final)
    publish.sync_folder(root)
    return final

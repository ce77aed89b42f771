"""Sort the files of the base's folder that training does not touch: which are copied, which are left out, and why."""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from apollo_sft.checkpoint.model_folder.tensor_files import FOREIGN_FORMS, INDEX_FILE, read_tensors, safe_path
from apollo_sft.checkpoint.run_folder.folder import OWN_NAMES, read_run
from apollo_sft.errors import CheckpointError

WEIGHT_FORMS = (".safetensors", ".safetensors.index.json", ".bin.index.json", ".onnx", ".onnx_data", *FOREIGN_FORMS)
STATE_OF_TRAINERS = ("trainer_state.json", "zero_to_fp32.py", "latest", "*.tfevents.*", "*.distcp", "training_args.bin")
"""Files that trainers leave beside a model and that are no part of it."""
MAX_BYTES = 200_000_000
"""A larger file, other than weights, is not copied: it would be in every checkpoint."""

CODE = (".py", ".pyc", ".so", ".sh")

OTHER_WEIGHTS = "weights in another form, or of another model"
OF_A_RUN = "a record of the run that made the base"
OF_A_TRAINER = "the state of the training that made the base"
OUTSIDE = "a link"
UNREADABLE = "this account may not read it"
TOO_LARGE = f"larger than {MAX_BYTES // 1_000_000} MB"
UNTRUSTED = "code, which is carried with model.trust_remote_code=true"
TAKEN_NAME = "a run has a file of that name"


@dataclass(frozen=True, slots=True)
class BaseFiles:
    """The files of a base's folder, without the weights themselves and without hidden files."""

    carried: tuple[str, ...] = ()
    """Paths in the folder of the files that are copied."""
    left_out: dict[str, str] = field(default_factory=dict)
    """The reason for each file that is not copied, by its path; the path of a folder ends in a slash."""


def sort_files(folder: Path, follow_links: bool = False, code: bool = False) -> BaseFiles:
    """Sort the files of a model folder.

    `follow_links`: copy also what a link leads to outside of it. `code`: copy code, too, which the user trusts.
    """
    carried: list[str] = []
    left_out: dict[str, str] = {}
    own_name = OF_A_RUN if read_run(folder) is not None else TAKEN_NAME
    weights = {stored.path.name for stored in read_tensors(folder, follow_links).values()} | {INDEX_FILE}

    for name in _names(folder, left_out):
        why = _why_not(folder, name, follow_links, code)
        if name in OWN_NAMES:  # in the folder of the new run, the name belongs to the run's own record
            why = own_name

        if why is None:
            carried.append(name)
        elif name not in weights:
            left_out[name] = why

    return BaseFiles(tuple(sorted(carried)), dict(sorted(left_out.items())))


def _names(folder: Path, left_out: dict[str, str]) -> Iterator[str]:
    """Yield the paths of the files in the folder. A folder inside with weights is another model: it is left out."""
    for root, folders, names in os.walk(folder):
        # `os.walk` enters what this list holds after the loop body: it is changed in place.
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name != "__pycache__")
        inside = Path(root).relative_to(folder).as_posix()
        prefix = "" if inside == "." else f"{inside}/"

        for name in list(folders):
            why = _why_no_folder(Path(root) / name, is_top=not prefix)
            if why is not None:
                left_out[f"{prefix}{name}/"] = why
                folders.remove(name)

        for name in names:
            if not name.startswith("."):
                yield f"{prefix}{name}"


def _why_no_folder(folder: Path, is_top: bool) -> str | None:
    if folder.is_symlink():
        return OUTSIDE
    if (is_top and folder.name in OWN_NAMES) or read_run(folder) is not None:
        return OF_A_RUN
    if any(path.name.endswith(WEIGHT_FORMS) for path in folder.rglob("*")):
        return OTHER_WEIGHTS
    return None


def _why_not(folder: Path, name: str, follow_links: bool, code: bool) -> str | None:
    """Return the reason why a file is not copied; None when it is."""
    path = folder / name
    if name.endswith(CODE) and not code:
        return UNTRUSTED
    if any(fnmatch.fnmatch(path.name, pattern) for pattern in STATE_OF_TRAINERS):
        return OF_A_TRAINER
    if name.endswith(WEIGHT_FORMS):
        return OTHER_WEIGHTS

    try:
        safe_path(folder, name, follow_links)
    except CheckpointError:
        return OUTSIDE

    if not os.access(path, os.R_OK):
        return UNREADABLE
    if path.stat().st_size > MAX_BYTES:
        return TOO_LARGE
    return None

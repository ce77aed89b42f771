"""Files in the base's folder that training does not touch: which are carried over, and which are left out, and why."""

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
"""What trainers leave beside a model, and is no part of it."""
MAX_BYTES = 200_000_000
"""A larger file that is no weights is not copied into every checkpoint."""

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
    """`carried`: names, as paths in the folder, of what is copied. `left_out`: why, by name; a folder ends by a slash.

    Neither has the weights themselves, nor hidden files.
    """

    carried: tuple[str, ...] = ()
    left_out: dict[str, str] = field(default_factory=dict)


def sort_files(folder: Path, follow_links: bool = False, code: bool = False) -> BaseFiles:
    """Look at every file of a model folder.

    `follow_links`: copy also what a link leads to outside of it. `code`: copy code, too, which the user trusts.
    """
    carried: list[str] = []
    left_out: dict[str, str] = {}
    own_name = OF_A_RUN if read_run(folder) is not None else TAKEN_NAME
    weights = {stored.path.name for stored in read_tensors(folder, follow_links).values()} | {INDEX_FILE}

    for name in _names(folder, left_out):
        why = own_name if name in OWN_NAMES else _why_not(folder, name, follow_links, code)
        if why is None:
            carried.append(name)
        elif name not in weights:
            left_out[name] = why
    return BaseFiles(tuple(sorted(carried)), dict(sorted(left_out.items())))


def _names(folder: Path, left_out: dict[str, str]) -> Iterator[str]:
    """Walk through the folder. A folder inside that holds weights is another model: it is left out as one."""
    for root, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name != "__pycache__")
        inside = Path(root).relative_to(folder).as_posix()
        prefix = "" if inside == "." else f"{inside}/"

        for name in list(folders):
            why = _why_no_folder(Path(root) / name, is_top=not prefix)
            if why is not None:
                left_out[f"{prefix}{name}/"] = why
                folders.remove(name)
        yield from (f"{prefix}{name}" for name in names if not name.startswith("."))


def _why_no_folder(folder: Path, is_top: bool) -> str | None:
    if folder.is_symlink():
        return OUTSIDE
    if (is_top and folder.name in OWN_NAMES) or read_run(folder) is not None:
        return OF_A_RUN
    return OTHER_WEIGHTS if any(path.name.endswith(WEIGHT_FORMS) for path in folder.rglob("*")) else None


def _why_not(folder: Path, name: str, follow_links: bool, code: bool) -> str | None:
    """Say why a file is not carried over; None when it is."""
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
    return TOO_LARGE if path.stat().st_size > MAX_BYTES else None

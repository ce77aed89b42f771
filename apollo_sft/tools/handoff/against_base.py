"""Compare a model folder with its base: files, tensors, and layers that config.json counts, beside what is trained.

Training does not come here.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from apollo_sft.checkpoint.model_folder.conversion import follow_names
from apollo_sft.checkpoint.model_folder.tensor_files import StoredTensor, read_tensors, same_values
from apollo_sft.checkpoint.run_folder.folder import read_run
from apollo_sft.errors import CheckpointError
from apollo_sft.tools.handoff.model_files import counted_layers, is_predicting
from apollo_sft.tools.handoff.subject import Subject, WrongError, some

TEMPLATES = ("chat_template.", "additional_chat_templates/")


def names_of(folder: Path | None) -> frozenset[str]:
    """Return the names of the base's tensors; none where it is not here, or can no longer be read."""
    if folder is None:
        return frozenset()
    return frozenset(_tensors(folder))


def check_base(subject: Subject) -> str:
    """Check that every file and tensor of the base is there. Those that training does not use must be unchanged."""
    folder = subject.base
    before: dict[str, StoredTensor] = {}
    if folder is not None:
        before = _tensors(folder)

    _check_predicted(subject, before)
    if folder is None:
        return "nothing to compare with: the base model is not here"

    stored = read_tensors(subject.folder)
    files = [name for name in _carried(subject) if not name.startswith(TEMPLATES)]  # compared by what they render
    lost = [name for name in files if not (subject.folder / name).is_file()]
    if lost:
        raise WrongError("lost_files", f"the base has {some(lost)}", f"copy them from {folder}, or export again")

    state = subject.model_state
    places = follow_names(subject.model, {**before, **stored})
    held = {id(state[places[name][0]]) for name in stored if places[name][0] in state}
    gone = [
        name
        for name in sorted(before.keys() - stored.keys())
        if places[name][0] not in state or id(state[places[name][0]]) not in held  # else a tied weight's second name
    ]
    if gone:
        raise WrongError("lost_tensors", f"the base has {len(gone)} more: {some(gone)}", "export again")

    copied = [name for name in before if places[name][0] not in state]
    changed = [
        name for name in copied if stored[name].spec != before[name].spec or not same_values(stored[name], before[name])
    ]
    if changed:
        what = f"{some(changed)}: training does not use them, and the base has other values"
        raise WrongError("changed_tensors", what, "export again")

    text = f"all {len(files)} files of the base"
    if copied:
        text += f", {len(copied)} tensors that training does not use as they were"
    return text


def _carried(subject: Subject) -> list[str]:
    """Return the files of the base that the run recorded to copy; none for a run of a version that recorded none."""
    facts: Mapping[str, Any] = {}
    if subject.run is not None:
        facts = read_run(subject.run) or {}
    return list(facts.get("base", {}).get("carried_files", ()))


def _tensors(folder: Path) -> dict[str, StoredTensor]:
    """Read the tensors of the base; none where its files can no longer be read: that is no fault of this folder."""
    try:
        return read_tensors(folder, follow_links=True)
    except CheckpointError:
        return {}


def _check_predicted(subject: Subject, before: Mapping[str, StoredTensor]) -> None:
    """Check that layers of multi-token prediction that config.json counts are there, unless the base lacks them too."""
    counted = counted_layers(subject.config)
    if not counted or any(is_predicting(subject, name) for name in subject.tensors):
        return
    if before and not any(is_predicting(subject, name) for name in before):
        return

    key, number = counted
    raise WrongError(
        "missing_prediction_layers",
        f"config.json counts {number} ({key}), and the files hold none",
        f'"{key}": 0 in config.json, or export again from a base that has them',
    )

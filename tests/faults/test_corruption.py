"""Every file of a checkpoint deleted, truncated, zeroed, bit-flipped, swapped; its manifest edited.

A start that goes on by itself names the file and takes the checkpoint before; one that was told to take this checkpoint
refuses. Nothing is ever read in part.
"""

from __future__ import annotations

import json
import random
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from apollo_sft.checkpoint import publish
from apollo_sft.checkpoint.run_folder import resume
from apollo_sft.errors import ApolloError
from tests.support.interrupted import differences, go_on, train_into, unfinished, write_dropout_inputs
from tests.support.reliability import record

KEYS = ("trainer.total_training_steps=4", "trainer.save_freq=1", "trainer.max_ckpt_to_keep=9", "trainer.test_freq=2")
BEFORE, DAMAGED = 2, 3
MANIFEST = publish.DIRECTORY_MANIFEST
Damage = Callable[[Path, Path], str]
"""Changes a checkpoint, given another one of the same run; the name that the refusal must hold."""


def deleted(path: Path, other: Path) -> None:
    path.unlink()


def emptied(path: Path, other: Path) -> None:
    path.write_bytes(b"")


def truncated(path: Path, other: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def halved(path: Path, other: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def zeroed(path: Path, other: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def longer(path: Path, other: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def swapped(path: Path, other: Path) -> None:
    path.write_bytes(other.read_bytes())


def replaced_by_a_folder(path: Path, other: Path) -> None:
    path.unlink()
    path.mkdir()


def flipped(position: float) -> Callable[[Path, Path], None]:
    def flip(path: Path, other: Path) -> None:
        content = bytearray(path.read_bytes())
        content[int(position * (len(content) - 1))] ^= 1 << random.Random(position).randrange(8)
        path.write_bytes(content)

    return flip


FILE_DAMAGE: dict[str, Callable[[Path, Path], None]] = {
    "deleted": deleted,
    "emptied": emptied,
    "truncated by a byte": truncated,
    "truncated to half": halved,
    "zeroed": zeroed,
    "longer by a byte": longer,
    "swapped with another step's": swapped,
    "a folder in its place": replaced_by_a_folder,
    **{f"a bit flipped at {position:.0%}": flipped(position) for position in (0.0, 0.001, 0.3, 0.7, 1.0)},
}


def edited(change: Callable[[dict[str, Any], str], object], name: str) -> Damage:
    def edit(checkpoint: Path, other: Path) -> str:
        content = json.loads((checkpoint / MANIFEST).read_text())
        change(content, name)
        (checkpoint / MANIFEST).write_text(json.dumps(content))
        return name

    return edit


def rewritten(text: str) -> Damage:
    def rewrite(checkpoint: Path, other: Path) -> str:
        (checkpoint / MANIFEST).write_text(text)
        return "unexpected file" if "[]}" in text or "{}}" in text else MANIFEST

    return rewrite


def unlisted_and_changed(name: str) -> Damage:
    def change(checkpoint: Path, other: Path) -> str:
        edited(lambda content, name: content["files"].pop(name), name)(checkpoint, other)
        flipped(0.7)(checkpoint / name, other / name)
        return name

    return change


def whole_of_another_step(checkpoint: Path, other: Path) -> str:
    shutil.rmtree(checkpoint)
    shutil.copytree(other, checkpoint)
    return checkpoint.name


def manifest_of_another_step(checkpoint: Path, other: Path) -> str:
    shutil.copy(other / MANIFEST, checkpoint / MANIFEST)
    return checkpoint.name


def damages(checkpoint: Path, other: Path) -> Iterator[tuple[str, Damage]]:
    files = sorted(str(path.relative_to(checkpoint)) for path in checkpoint.rglob("*") if path.is_file())
    for name in files:
        for kind, damage in FILE_DAMAGE.items():
            if name == MANIFEST and kind not in ("emptied", "truncated to half", "zeroed", "longer by a byte"):
                continue  # without it a checkpoint was never finished; other changes have cases of their own
            if kind.startswith("swapped") and (checkpoint / name).read_bytes() == (other / name).read_bytes():
                continue

            def apply(checkpoint: Path, other: Path, name: str = name, damage: Any = damage) -> str:
                damage(checkpoint / name, other / name)
                return name

            yield f"{name}: {kind}", apply
        if name != MANIFEST:
            for kind, change in {
                "its hash edited": lambda content, name: content["files"][name].update(sha256="0" * 64),
                "its size edited": lambda content, name: content["files"][name].update(size=1),
                "its entry a text": lambda content, name: content["files"].update({name: "whole"}),
            }.items():
                yield f"{name}: {kind}", edited(change, name)
    state = [name for name in files if not name.startswith("hf/") and name != MANIFEST]
    for name in state:
        yield f"{name}: changed, and left out of the manifest", unlisted_and_changed(name)
    texts = ("", "{", "[]", "null", "{}", '{"files": null}', '{"files": []}', '{"files": "all"}', '{"files": {}}')
    for text in texts:
        yield f"manifest: {text!r}", rewritten(text)
    yield (
        "manifest: names a file outside",
        edited(lambda content, name: content["files"].update({name: {"size": 1, "sha256": ""}}), "../state.json"),
    )
    yield "manifest: of another step", manifest_of_another_step
    yield "all of it: another step's", whole_of_another_step


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dropout_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def reference(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("reference") / "out"
    train_into(inputs, out, *KEYS)
    return out


def refusal(damaged: Path, says: str) -> list[str]:
    """What is wrong with how the checkpoint is refused when it is asked for."""
    try:
        resume.fork_point(str(damaged), {}, True, [])
    except ApolloError as error:
        return [] if says in str(error) or MANIFEST in str(error) else [f"refused without its name: {error}"]
    return ["taken, when it was asked for"]


def passing_over(checkpoints: Path, says: str) -> list[str]:
    """What is wrong with how the newest whole checkpoint is found."""
    notes: list[str] = []
    found = resume.newest_checkpoint(checkpoints, notes)
    wrong = [] if found is not None and found.name == f"step_{BEFORE:06}" else [f"found {found}"]
    named = any("skipped" in note and (says in note or MANIFEST in note) for note in notes)
    return wrong if named else [*wrong, f"not named: {notes}"]


def test_every_file_damaged_in_every_way(inputs: Path, reference: Path, tmp_path: Path) -> None:
    wrong, trials, worst = [], 0, 0.0
    root = unfinished(reference, tmp_path / "out", DAMAGED)
    damaged, other = (root / "checkpoints" / f"step_{step:06}" for step in (DAMAGED, BEFORE))
    whole = shutil.copytree(damaged, tmp_path / "whole")
    for name, damage in damages(whole, other):
        says = damage(damaged, other)
        began = time.perf_counter()
        problems = passing_over(root / "checkpoints", says)
        if name != "all of it: another step's":  # at another place it is what it says that it is
            problems += refusal(damaged, says)
        worst = max(worst, time.perf_counter() - began)
        wrong += [f"{name}: {problem}" for problem in problems]
        trials += 1
        shutil.rmtree(damaged)
        shutil.copytree(whole, damaged)
    record("a file of a checkpoint damaged, or its manifest", trials=trials, failures=len(wrong), worst_seconds=worst)
    assert not wrong, "\n".join(wrong)
    assert trials > 120
    assert resume.newest_checkpoint(root / "checkpoints", []) == damaged


@pytest.mark.parametrize("kind", ["deleted", "a bit flipped at 70%", "swapped with another step's"])
def test_the_run_goes_on_from_the_checkpoint_before(
    inputs: Path, reference: Path, tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    root = unfinished(reference, tmp_path / "out", DAMAGED)
    damaged, other = (root / "checkpoints" / f"step_{step:06}" for step in (DAMAGED, BEFORE))
    (shard,) = damaged.glob("*.safetensors")
    FILE_DAMAGE[kind](shard, other / shard.name)
    go_on(inputs, root, *KEYS)
    said = capsys.readouterr().err
    assert f"skipped a damaged checkpoint: {shard}" in said
    assert f"from step_{BEFORE:06}" in said
    assert differences(root, reference) == []


def test_a_checkpoint_without_its_manifest_was_never_finished(inputs: Path, reference: Path, tmp_path: Path) -> None:
    root = unfinished(reference, tmp_path / "out", DAMAGED)
    (root / "checkpoints" / f"step_{DAMAGED:06}" / MANIFEST).unlink()
    go_on(inputs, root, *KEYS)
    assert differences(root, reference) == []


def test_a_run_whose_every_checkpoint_is_damaged_begins_anew_and_says_so(
    inputs: Path, reference: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = unfinished(reference, tmp_path / "out", 2)
    for path in root.glob("checkpoints/step_*/state.json"):
        path.write_text("{}")
    go_on(inputs, root, *KEYS)
    said = capsys.readouterr().err
    assert said.count("skipped a damaged checkpoint") == 2
    assert "from the first step: it has no checkpoint" in said
    assert differences(root, reference) == []

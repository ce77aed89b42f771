"""Runs that were stopped, gone on with, and compared with the one that never was: bit for bit."""

import hashlib
import json
import os
import re
import shutil
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from apollo_sft.checkpoint import publish
from apollo_sft.checkpoint.run_folder.lock import OWNER
from apollo_sft.config.compose import Composed, compose
from apollo_sft.errors import AlreadyDone
from apollo_sft.train.run import train
from tests.support.runs import arguments, read_metrics, without_clock, write_inputs

DROPOUT = {"attention_dropout": 0.1}
"""So that random states matter."""
CLOCK = re.compile(
    rb'"(?:started|finished|seen|token|train/tokens_per_second|train/step_seconds|memory/peak_bytes)"'
    rb': (?:[\d.e+-]+|"[^"]*"|null)|"stages?": (?:"[^"]*"|null|\{[^}]*\})'
)
"""Entries of run.json and metrics.jsonl that no two runs share."""
KINDS: dict[str, tuple[str, ...]] = {
    "plain": (),
    "LoRA": ("model.lora_rank=2", "model.lora_dropout=0.1"),
}


def write_dropout_inputs(folder: Path) -> Path:
    return write_inputs(folder, **DROPOUT)


def model_contents(out: Path) -> dict[str, bytes]:
    """The weights that a finished run leaves, by name in its folder."""
    return {str(path.relative_to(out)): path.read_bytes() for path in weight_files(out)}


def weight_files(out: Path) -> list[Path]:
    return sorted([*out.glob("*.safetensors"), *out.glob("adapter/*.safetensors")])


def differences(out: Path, reference: Path) -> list[str]:
    """What of a finished run is not as in the run that was never stopped; empty when it is bit-equal."""
    found = []
    if not weight_files(out) or model_contents(out) != model_contents(reference):
        found.append("the weights differ")
    mine, theirs = (without_clock(read_metrics(folder)) for folder in (out, reference))
    if [record["step"] for record in mine] != [record["step"] for record in theirs]:
        found.append(f"steps {[record['step'] for record in mine]}")
    found += [f"step {a['step']}: {a} != {b}" for a, b in zip(mine, theirs, strict=False) if a != b][:1]
    hidden = [str(path.relative_to(out)) for path in out.rglob(f"{publish.STAGING_PREFIX}*")]
    return found + [f"left over: {name}" for name in hidden]


def unfinished(reference: Path, out: Path, steps: int) -> Path:
    """The folder of a finished run as it was after its checkpoint of `steps` steps, without any later one."""
    shutil.copytree(reference, out, symlinks=True)
    for name in publish.model_files(out):
        (out / name).unlink()
    shutil.rmtree(out / "adapter", ignore_errors=True)
    for path in (out / "checkpoints").iterdir():
        if path.is_symlink():
            path.unlink()
        elif int(path.name.removeprefix("step_")) > steps:
            shutil.rmtree(path)
    return out


@cache
def _composed(inputs: Path, more: tuple[str, ...]) -> Composed:
    return compose(arguments(inputs, inputs / "out", *more))


def train_into(inputs: Path, out: Path, *more: str) -> None:
    """As `train_here`, but quick to repeat: the configuration of such runs is composed once."""
    composed = _composed(inputs, more)
    trainer = composed.config.trainer.model_copy(update={"default_local_dir": str(out)})
    train(composed.config.model_copy(update={"trainer": trainer}), composed.overridden, composed.notes)


def go_on(inputs: Path, out: Path, *more: str) -> None:
    """The same command again; a run that is complete says so."""
    try:
        train_into(inputs, out, *more)
    except AlreadyDone:
        return


def bury_owner(out: Path) -> None:
    """What holds the folder by its own account is this process, which lives: let it be one that is gone."""
    owner = out / OWNER
    with suppress(OSError, ValueError):
        owner.write_text(json.dumps(json.loads(owner.read_text()) | {"process_started": "0"}))


def fingerprint(folder: Path) -> str:
    """Equal for two folders with the same names, links and contents, but for what the clock has put into them."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            content = os.fsencode(path.readlink())
        else:
            content = CLOCK.sub(b"", path.read_bytes()) if path.is_file() else b"a folder"
        digest.update(os.fsencode(path.relative_to(folder)) + b"\0" + hashlib.sha256(content).digest())
    return digest.hexdigest()


def whole_steps(out: Path) -> list[int]:
    """Steps of the folders with a manifest, in order."""
    paths = (out / "checkpoints").glob(f"step_*/{publish.DIRECTORY_MANIFEST}")
    return sorted(int(path.parent.name.removeprefix("step_")) for path in paths)


def losses(metrics: list[dict[str, Any]]) -> list[float]:
    return [record["train/loss"] for record in metrics if "train/loss" in record]

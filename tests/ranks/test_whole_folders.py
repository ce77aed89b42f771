"""Every file that a run leaves is the base's, an edited one of the base's, or a trained weight."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from apollo_sft.checkpoint.model_folder.tensor_files import read_tensors, write_tensors
from apollo_sft.cli.main import main
from tests.support.data import write_parquet
from tests.support.runs import finish, rows, start
from tests.support.whole_bases import NEXT, write_gemma3, write_glm4_moe, write_in_cache, write_own_code

REPOSITORY = "someone/own-code"
BASES = {
    "gemma3": (write_gemma3, ()),
    "glm4_moe": (write_glm4_moe, ()),
    "own code": (write_own_code, ("model.trust_remote_code=true",)),
    "own code in a sub-folder": (lambda f: write_own_code(f, inside="code"), ("model.trust_remote_code=true",)),
    "code of another repository": (
        lambda f: write_own_code(f, repository=REPOSITORY),
        ("model.trust_remote_code=true",),
    ),
}
RECORDS = {"run.json", "config.yaml", "metrics.jsonl", "data_audit.json", "rejected.jsonl", "checkpoints"}


def _files(folder: Path) -> dict[str, bytes]:
    found = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}


LONG = ("own code", "code of another repository")


@pytest.fixture(
    scope="module", params=[pytest.param(name, marks=pytest.mark.long) if name in LONG else name for name in BASES]
)
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, Path]:
    """The name of a base, its folder, and the folder of two steps of training on two ranks."""
    name: str = request.param
    folder = tmp_path_factory.mktemp("whole")
    write, more = BASES[name]
    write(folder / "base")  # type: ignore[operator]
    write_parquet(folder / "train.parquet", rows(40))
    before = {key: os.environ.get(key) for key in ("HF_HOME", "HF_MODULES_CACHE")}
    if more:  # code of its own, which is looked for in a cache; processes with another cache cannot be forked
        cache = folder / "cache"
        write_in_cache(cache / "hub", REPOSITORY)
        os.environ |= {"HF_HOME": str(cache), "HF_MODULES_CACHE": str(cache / "modules")}
    keys = (f"model.partial_pretrain={folder / 'base'}", "data.val_files=null", "trainer.total_training_steps=2")
    try:
        process = start(folder, folder / "run", *keys, *more, processes=2)
        said = finish(process)
    finally:
        for key, value in before.items():
            os.environ.pop(key, None) if value is None else os.environ.__setitem__(key, value)
    assert process.returncode == 0, said[-3000:]
    return name, folder, folder / "run"


def test_every_file_is_the_bases_an_edited_one_or_weights(trained: tuple[str, Path, Path]) -> None:
    _, folder, run = trained
    before, after = _files(folder / "base"), _files(run)
    model = {path: raw for path, raw in after.items() if path.split("/")[0] not in RECORDS and path[0] != "."}
    facts = json.loads((run / "run.json").read_text())["base"]

    weights = {path for path in model if path.endswith((".safetensors", ".safetensors.index.json"))}
    assert set(model) - weights == set(facts["carried_files"])
    edited = {path for path in set(model) - weights if model[path] != before[path]}
    assert edited == {"generation_config.json"}, "the base ends at another token than the one that was trained"
    said = {path.rstrip("/") for path in facts["files_left_out"]}
    unsaid = {
        path for path in before if path not in model and not path.startswith((".", *said)) and "safetensors" not in path
    }
    assert unsaid == set()

    old, new = (json.loads(files["generation_config.json"]) for files in (before, model))
    assert new == old | {"eos_token_id": [2, 0]}
    assert _files(run / "checkpoints" / "latest" / "hf") == model


def test_every_tensor_is_trained_or_the_bases(trained: tuple[str, Path, Path]) -> None:
    name, folder, run = trained
    before, after = read_tensors(folder / "base"), read_tensors(run)
    assert {key: tensor.spec for key, tensor in before.items()} == {key: tensor.spec for key, tensor in after.items()}
    copied = set(json.loads((run / "run.json").read_text())["base"]["copied_tensors"])
    assert copied == {key for key in before if key.startswith(NEXT)}
    assert bool(copied) == (name == "glm4_moe")
    moved = set()
    for key, tensor in after.items():
        values = [load_file(stored.path)[key].view(torch.uint8) for stored in (before[key], tensor)]
        moved |= set() if torch.equal(*values) else {key}
    assert moved.isdisjoint(copied)
    assert len(moved) >= 12


def test_handoff_passes(trained: tuple[str, Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    name, _, run = trained
    if name == "code of another repository":
        pytest.skip("that code is in a cache that this process does not use")
    code, checks = _handoff(run, capsys, *(["--trust-remote-code"] if "code" in name else []))
    assert ({key: check for key, check in checks.items() if check["state"] == "wrong"}, code) == ({}, 0)
    told = "tensors that training does not use as they were" in checks["base"]["what"]
    assert told == (name == "glm4_moe")


def _without_tensors(*prefixes: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        for path in folder.glob("*.safetensors"):
            kept = {key: value for key, value in load_file(path).items() if not key.startswith(prefixes)}
            write_tensors(kept, path)
        index = folder / "model.safetensors.index.json"
        if index.is_file():
            raw = json.loads(index.read_text())
            raw["weight_map"] = {k: v for k, v in raw["weight_map"].items() if not k.startswith(prefixes)}
            index.write_text(json.dumps(raw))

    return change


def _changed_tensor(folder: Path) -> None:
    [path] = folder.glob("*.safetensors")
    write_tensors(load_file(path) | {f"{NEXT}.enorm.weight": torch.ones(32)}, path)


BROKEN: dict[str, tuple[str, Callable[[Path], None]]] = {
    "lost_files": ("gemma3", lambda folder: (folder / "preprocessor_config.json").unlink()),
    "lost_files: of the tokenizer": ("gemma3", lambda folder: (folder / "tokenizer.model").unlink()),
    "lost_tensors": ("glm4_moe", _without_tensors(f"{NEXT}.eh_proj")),
    "changed_tensors": ("glm4_moe", _changed_tensor),
    "missing_prediction_layers": ("glm4_moe", _without_tensors(NEXT)),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_lost_is_named(
    case: str, trained: tuple[str, Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    family, change = BROKEN[case]
    name, _, run = trained
    if name != family:
        pytest.skip(f"a fault of {family}")
    folder = tmp_path / "model"
    shutil.copytree(run, folder, ignore=shutil.ignore_patterns("checkpoints", ".apollo-*"))
    change(folder)
    code, checks = _handoff(folder, capsys)
    assert code == 2
    assert [check["name"] for check in checks.values() if check["state"] == "wrong"] == [case.split(":")[0]]


def _handoff(folder: Path, capsys: pytest.CaptureFixture[str], *more: str) -> tuple[int, dict[str, dict[str, Any]]]:
    capsys.readouterr()
    code = main(["handoff", str(folder), "--json", "--no-generate", *more])
    return code, {check["check"]: check for check in json.loads(capsys.readouterr().out)["checks"]}

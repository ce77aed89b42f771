"""What a model folder may hold, and what is refused: damaged files, names that leave the folder."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from apollo_sft.checkpoint import publish
from apollo_sft.checkpoint.model_folder.reopen import verify_model_folder
from apollo_sft.checkpoint.model_folder.tensor_files import read_base_tensors, read_tensors
from apollo_sft.checkpoint.model_folder.write import ExportResult, export_model
from apollo_sft.errors import CheckpointError, ModelError
from tests.support.exports import CASES, base_on_disk, options
from tests.support.models import tiny_model

INDEX = "model.safetensors.index.json"
Exported = tuple[Path, ExportResult]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    folder = tmp_path_factory.mktemp("verify")
    base = base_on_disk(folder / "base", "llama-untied")
    staging = publish.staging_folder(folder, "model")
    model = tiny_model(CASES["llama-untied"](), torch.float32)
    return staging, export_model(model, base, staging, options(max_shard_bytes=20_000), True)


@pytest.fixture
def exported(original: Exported, tmp_path: Path) -> Exported:
    return shutil.copytree(original[0], tmp_path / "model"), original[1]


def first_shard(folder: Path) -> Path:
    return sorted(folder.glob("*.safetensors"))[0]


def edit_json(path: Path, change: Callable[[dict[str, object]], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def change_tensor(folder: Path, change: Callable[[dict[str, torch.Tensor], str], object]) -> None:
    tensors = load_file(first_shard(folder))
    change(tensors, sorted(tensors)[0])
    save_file(tensors, first_shard(folder), metadata={"format": "pt"})


def test_a_good_folder_passes(exported: Exported) -> None:
    verify_model_folder(exported[0], exported[1].tensors, exported[1].digests)


MUTATIONS: dict[str, tuple[Callable[[Path], object], str]] = {
    "config is missing": (lambda f: (f / "config.json").unlink(), "config.json is missing"),
    "config is no JSON": (lambda f: (f / "config.json").write_text("{"), "not valid JSON"),
    "config is a list": (lambda f: (f / "config.json").write_text("[]"), "not a JSON object"),
    "config is of no model": (lambda f: edit_json(f / "config.json", lambda c: c.pop("model_type")), "cannot open"),
    "config lies about the dtype": (
        lambda f: edit_json(f / "config.json", lambda c: c.update(dtype="bfloat16")),
        "does not state the dtype",
    ),
    "shard is missing": (lambda f: first_shard(f).unlink(), "is missing"),
    "shard is empty": (lambda f: first_shard(f).write_bytes(b""), "no complete safetensors file"),
    "shard is cut": (lambda f: first_shard(f).write_bytes(first_shard(f).read_bytes()[:-7]), "truncated"),
    "shard is longer": (lambda f: first_shard(f).write_bytes(first_shard(f).read_bytes() + b"x"), "bytes of no tensor"),
    "header is huge": (
        lambda f: first_shard(f).write_bytes(struct.pack("<Q", 1 << 62) + b"{}"),
        "no complete safetensors file",
    ),
    "header is no JSON": (lambda f: first_shard(f).write_bytes(struct.pack("<Q", 2) + b"{["), "damaged"),
    "tensor of another shape": (
        lambda f: change_tensor(f, lambda t, n: t.update({n: t[n].reshape(-1)})),
        "shape=",
    ),
    "tensor of another dtype": (lambda f: change_tensor(f, lambda t, n: t.update({n: t[n].bfloat16()})), "BF16"),
    "tensor of other bytes": (lambda f: change_tensor(f, lambda t, n: t.update({n: t[n] + 1})), "does not read back"),
    "tensor not in the index": (
        lambda f: change_tensor(f, lambda t, _: t.update(extra=torch.ones(1))),
        "only in the file: extra",
    ),
    "tensor only in the index": (
        lambda f: edit_json(f / INDEX, lambda c: c["weight_map"].update(extra=first_shard(f).name)),  # type: ignore[attr-defined]
        "only in the index: extra",
    ),
    "index without a map": (lambda f: (f / INDEX).write_text("{}"), "no weight_map"),
    "index is missing": (lambda f: (f / INDEX).unlink(), "no safetensors file"),
    "a stray shard": (lambda f: shutil.copy(first_shard(f), f / "other.safetensors"), "belong to no model"),
    "tokenizer is missing": (lambda f: (f / "tokenizer.json").unlink(), "cannot open"),
    "tokenizer is damaged": (lambda f: (f / "tokenizer.json").write_text('{"version": '), "cannot open"),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_damaged_folder_is_refused(exported: Exported, mutation: str) -> None:
    folder, result = exported
    damage, message = MUTATIONS[mutation]
    damage(folder)
    with pytest.raises(CheckpointError, match=message):
        verify_model_folder(folder, result.tensors, result.digests)


def test_a_single_byte_anywhere_in_the_weights_counts(exported: Exported) -> None:
    folder, result = exported
    path = first_shard(folder)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    verify_model_folder(folder, result.tensors)
    with pytest.raises(CheckpointError, match="does not read back"):
        verify_model_folder(folder, result.tensors, result.digests)


@pytest.mark.parametrize(
    "name", ["/{outside}/weights.safetensors", "../outside/weights.safetensors", "link/weights.safetensors"]
)
def test_an_index_that_leaves_the_folder_is_refused(tmp_path: Path, name: str) -> None:
    """transformers itself follows such a name."""
    outside = tmp_path / "outside"
    outside.mkdir()
    save_file({"secret": torch.ones(2)}, outside / "weights.safetensors")
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "link").symlink_to(outside)
    name = name.replace("/{outside}", str(outside))
    (folder / INDEX).write_text(json.dumps({"weight_map": {"secret": name}}))
    with pytest.raises(ModelError, match=r"outside itself|link out of its folder") as refusal:
        read_base_tensors(folder)
    assert refusal.value.exit_code == 2


def test_a_linked_weight_file_is_refused_but_for_the_cache_of_the_hub(tmp_path: Path) -> None:
    blob = tmp_path / "models--a--b" / "blobs" / "0123"
    blob.parent.mkdir(parents=True)
    save_file({"weight": torch.ones(2)}, blob)
    snapshot = tmp_path / "models--a--b" / "snapshots" / "main"
    plain = tmp_path / "plain" / "model"
    for folder in (snapshot, plain):
        folder.mkdir(parents=True)
        (folder / "model.safetensors").symlink_to(blob)
    assert set(read_base_tensors(snapshot)) == {"weight"}
    with pytest.raises(ModelError, match="link out of its folder"):
        read_base_tensors(plain)


def test_a_folder_without_weights_has_no_tensors(tmp_path: Path) -> None:
    assert read_base_tensors(tmp_path) == {}


def test_every_kind_of_tensor_is_read(tmp_path: Path) -> None:
    kinds = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.int16]
    kinds += [torch.int8, torch.uint8, torch.bool, torch.float8_e4m3fn]
    tensors = {str(kind): torch.ones(3, 2).to(kind) for kind in kinds} | {
        "none": torch.ones(0, 4),
        "one": torch.ones(()),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    found = read_tensors(tmp_path)
    assert {name: stored.spec.shape for name, stored in found.items()} == {
        n: tuple(t.shape) for n, t in tensors.items()
    }


@pytest.mark.parametrize("case", range(200))
def test_no_mutated_header_is_read_in_silence(original: Exported, tmp_path: Path, case: int) -> None:
    """Either the same specs as before, or a refusal; never another exception and never other content unnoticed."""
    generator = torch.Generator().manual_seed(case)
    source = first_shard(original[0])
    content = bytearray(source.read_bytes())
    header = 8 + struct.unpack("<Q", content[:8])[0]
    position = int(torch.randint(header, (1,), generator=generator))
    content[position] = int(torch.randint(256, (1,), generator=generator))
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    tensors = {name: spec for name, spec in original[1].tensors.items() if name in load_file(source)}
    digests = {name: original[1].digests[name] for name in tensors}
    for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(original[0] / name, tmp_path)
    try:
        verify_model_folder(tmp_path, tensors, digests)
    except CheckpointError:
        return
    assert all(torch.equal(tensor, load_file(source)[name]) for name, tensor in load_file(path).items())

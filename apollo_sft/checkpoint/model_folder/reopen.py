"""Re-open a model folder as another program would, and compare it with what was to be written."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from apollo_sft.checkpoint.model_folder.sidecars import main_dtype, stated_dtype
from apollo_sft.checkpoint.model_folder.tensor_files import (
    INDEX_FILE,
    StoredTensor,
    file_digest,
    read_tensors,
    safe_path,
)
from apollo_sft.checkpoint.publish import read_json
from apollo_sft.errors import CheckpointError
from apollo_sft.types import TensorSpec


def verify_model_folder(
    folder: Path,
    expected: Mapping[str, TensorSpec],
    digests: Mapping[str, str] | None = None,
    trust_remote_code: bool = False,
) -> None:
    """Check that a folder holds the expected tensors and nothing else, and that transformers opens it.

    `digests`: sha256 of each tensor's bytes as they were before writing; None leaves the bytes unread.
    Raises: CheckpointError naming the first difference.
    """
    config = read_json(safe_path(folder, "config.json"))
    tensors = read_tensors(folder)
    _compare_specs(folder, tensors, expected)

    stray = {path.name for path in folder.glob("*.safetensors")} - {stored.path.name for stored in tensors.values()}
    if stray:
        raise CheckpointError(f"{folder} holds weight files that belong to no model", found=", ".join(sorted(stray)))

    if stated_dtype(config) not in (main_dtype(expected), None):
        raise CheckpointError(
            f"{folder / 'config.json'} does not state the dtype of the files",
            found=stated_dtype(config),
            expected=main_dtype(expected),
        )

    for name, digest in (digests or {}).items():
        if file_digest(tensors[name]) != digest:
            raise CheckpointError(f"{tensors[name].path}: {name} does not read back as it was written")

    if digests is not None and set(digests) != set(expected):
        raise CheckpointError(f"{folder}: not every tensor was hashed while it was written")

    _check_loads(folder, trust_remote_code)


def _compare_specs(folder: Path, found: Mapping[str, StoredTensor], expected: Mapping[str, TensorSpec]) -> None:
    if not found:
        raise CheckpointError(f"{folder} holds no safetensors file", expected=f"model.safetensors, or {INDEX_FILE}")

    problems = {
        "lacks tensors": set(expected) - set(found),
        "holds tensors that do not belong there": set(found) - set(expected),
    }
    for problem, names in problems.items():
        if names:
            raise CheckpointError(f"{folder} {problem}", found=", ".join(sorted(names)[:5]))

    for name, spec in expected.items():
        if found[name].spec != spec:
            raise CheckpointError(f"{found[name].path}: {name}", found=found[name].spec, expected=spec)


def _check_loads(folder: Path, trust_remote_code: bool) -> None:
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    try:
        AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        GenerationConfig.from_pretrained(folder)
        AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (ValueError, OSError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"transformers cannot open {folder}", found=f"{type(error).__name__}: {error}") from error

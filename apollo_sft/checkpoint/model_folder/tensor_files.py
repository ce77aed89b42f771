"""Safetensors files of a model folder: headers are checked here before any library trusts them, and shards written.

A file with the tensor `w` = [1.0, 2.0] in float32, for example, has 8 + 54 + 8 bytes:

    36 00 00 00 00 00 00 00                                   the length of the header, little-endian
    {"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}     the header; offsets count from its end
    00 00 80 3f 00 00 00 40                                   the data of all tensors, without gaps

Source: the safetensors format, https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from apollo_sft.checkpoint.publish import read_json
from apollo_sft.errors import CheckpointError, ModelError
from apollo_sft.types import TensorSpec

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MAX_HEADER_BYTES = 100_000_000
FOREIGN_FORMS = (".bin", ".pt", ".pth", ".pkl", ".ckpt", ".h5", ".msgpack", ".gguf", ".npz")
"""Weights that are not read: pickles run code when they are opened, and the rest belongs to other libraries."""
READ_FORMS = (".json", ".safetensors", ".txt", ".model", ".jinja", ".py", ".tiktoken")
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
"""The dtypes in which a model may be trained, or hold a buffer."""
COPIED_DTYPES = DTYPES | {
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
}
"""The dtypes in which tensors that are not trained are copied from the base's files."""
DTYPE_BITS = {name: dtype.itemsize * 8 for name, dtype in COPIED_DTYPES.items()}
COMPARED_BYTES = 1 << 24
"""The part of two tensors that is read at once to compare them."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor in a file."""

    spec: TensorSpec
    path: Path
    begin: int
    """The position in the file of its first byte."""
    end: int
    """The position after its last byte."""


def read_base(folder: Path, follow_links: bool = False) -> dict[str, StoredTensor]:
    """Find the tensors in the safetensors files of a model folder, by name; none when it has none. Read no weights.

    Every file of the folder that may be read must be in it; `follow_links`: it may also be a link to anywhere.
    Raises: ModelError for a damaged file, an index or a link that leaves the folder.
    """
    try:
        for path in [*folder.iterdir(), *folder.glob("additional_chat_templates/*")]:
            if path.suffix in READ_FORMS and not path.is_dir():
                safe_path(folder, path.relative_to(folder).as_posix(), follow_links)
        return read_tensors(folder, follow_links)
    except CheckpointError as error:
        raise ModelError(str(error)) from error


def read_base_tensors(folder: Path, follow_links: bool = False) -> dict[str, TensorSpec]:
    """Find the shape and dtype of each tensor in a model folder, by name. Raises: ModelError as `read_base`."""
    return specs_of(read_base(folder, follow_links))


def specs_of(stored: Mapping[str, StoredTensor]) -> dict[str, TensorSpec]:
    """Return the shape and dtype of each tensor, without its place in a file."""
    return {name: tensor.spec for name, tensor in stored.items()}


def read_tensors(folder: Path, follow_links: bool = False) -> dict[str, StoredTensor]:
    """Find every tensor of the safetensors files that transformers would load from `folder`.

    Raises: CheckpointError for a damaged file, an index that does not fit its files, or one that leaves the folder.
    """
    if (folder / SINGLE_FILE).is_file():
        return read_header(safe_path(folder, SINGLE_FILE, follow_links))
    if not (folder / INDEX_FILE).is_file():
        return {}

    weight_map = read_json(safe_path(folder, INDEX_FILE, follow_links)).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise CheckpointError(f"{folder / INDEX_FILE} has no weight_map from tensor names to file names")

    tensors: dict[str, StoredTensor] = {}
    for file_name in sorted(set(weight_map.values())):
        held = read_header(safe_path(folder, file_name, follow_links))
        mapped = {name for name, mapped_file in weight_map.items() if mapped_file == file_name}
        if mapped != set(held):
            raise CheckpointError(
                f"{folder / INDEX_FILE} does not fit {file_name}",
                found=f"only in the index: {some(mapped - set(held))}; only in the file: {some(set(held) - mapped)}",
            )

        tensors.update(held)

    return tensors


def safe_path(folder: Path, name: str, follow_links: bool = False) -> Path:
    """Return the path of a file that a folder of others names.

    Raises: CheckpointError when it is outside of the folder, by its name or through a link, or does not exist.
    """
    if Path(name).is_absolute() or ".." in Path(name).parts or name in ("", "."):
        raise CheckpointError(f"{folder} names a file outside itself", found=name, expected="a file of that folder")

    # The folder itself may be reached by a link, for example to a snapshot in the hub's cache. There, the files of a
    # snapshot are links to the blobs beside it.
    root = folder.resolve()
    if root.parent.name == "snapshots":
        root = root.parent.parent

    path = folder / name
    if not follow_links and not path.resolve().is_relative_to(root):
        raise CheckpointError(
            f"{path} is a link out of its folder",
            found=path.resolve(),
            expected=f"below {root}",
            fix="copy the file; or model.follow_links=true if you made the link",
        )
    if not path.is_file():
        raise CheckpointError(f"{path} is missing")
    return path


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Read the header of one safetensors file.

    Raises: CheckpointError when the header is malformed or does not fit the size of the file.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > min(MAX_HEADER_BYTES, size - 8):
            raise CheckpointError(f"{path} is no complete safetensors file", found=f"{size} bytes, header of {length}")
        raw = file.read(length)

    try:
        header = json.loads(raw)
        header.pop("__metadata__", None)
        tensors = {name: _stored(path, entry, 8 + length) for name, entry in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path} has a damaged safetensors header", found=f"{error!r}") from error

    # Every byte belongs to exactly one tensor, so overlaps, gaps and a truncated file are all found.
    position = 8 + length
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)):
        bits = math.prod(tensor.spec.shape) * DTYPE_BITS[tensor.spec.dtype]
        if tensor.begin != position or (tensor.end - tensor.begin) * 8 != bits:
            raise CheckpointError(f"{path}: the bytes of {name} do not fit its shape and dtype")
        position = tensor.end

    if position != size:
        raise CheckpointError(
            f"{path} is truncated or has bytes of no tensor", found=size, expected=f"{position} bytes"
        )
    return tensors


def _stored(path: Path, entry: dict[str, Any], start: int) -> StoredTensor:
    shape = tuple(int(size) for size in entry["shape"])
    dtype = str(entry["dtype"])
    begin, end = (int(offset) for offset in entry["data_offsets"])

    # The caller reports a ValueError as a damaged header.
    if dtype not in DTYPE_BITS or any(size < 0 for size in shape):
        raise ValueError(f"dtype {dtype}, shape {shape}")
    return StoredTensor(TensorSpec(shape, dtype), path, start + begin, start + end)


def read_whole(stored: Mapping[str, StoredTensor], names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
    """Read tensors one by one, as they are in the files. A name that `stored` lacks is left out."""
    from safetensors import safe_open

    for name in names:
        if name in stored:
            with safe_open(stored[name].path, "pt") as file:
                yield name, file.get_tensor(name)


def same_values(one: StoredTensor, other: StoredTensor) -> bool:
    """Return whether two tensors in files hold the same numbers, by reading both up to the first difference."""
    if one.spec.shape != other.spec.shape:
        return False

    a_size = DTYPE_BITS[one.spec.dtype] // 8
    b_size = DTYPE_BITS[other.spec.dtype] // 8
    total = math.prod(one.spec.shape)
    step = COMPARED_BYTES // max(a_size, b_size)

    with one.path.open("rb") as a_file, other.path.open("rb") as b_file:
        a_file.seek(one.begin)
        b_file.seek(other.begin)
        for start in range(0, total, step):
            count = min(step, total - start)
            a = a_file.read(count * a_size)
            b = b_file.read(count * b_size)
            if a != b and not _same_numbers((a, one.spec.dtype), (b, other.spec.dtype)):
                return False

    return True


def _same_numbers(*parts: tuple[bytes, str]) -> bool:
    """Compare numbers whose bytes differ: -0.0 equals 0.0, and one number may be stored in two dtypes."""
    a, b = (torch.frombuffer(bytearray(raw), dtype=COPIED_DTYPES[dtype]) for raw, dtype in parts)
    return a.is_floating_point() and b.is_floating_point() and torch.equal(a.double(), b.double())


def write_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write a safetensors file with the permissions of any new file."""
    from safetensors.torch import save_file

    # The library makes a file that only its owner can read, and knows no umask: an empty file gives the mode.
    path.touch()
    mode = path.stat().st_mode & 0o777
    save_file(dict(tensors), path, metadata={"format": "pt"})
    path.chmod(mode)


def file_digest(tensor: StoredTensor) -> str:
    """Return the sha256 of the bytes of a tensor, re-read from the disk where the system allows it."""
    digest = hashlib.sha256()
    with tensor.path.open("rb") as file:
        # Without this, the pages that were just written would be read from memory, and a bad disk not noticed.
        os.posix_fadvise(file.fileno(), tensor.begin, tensor.end - tensor.begin, os.POSIX_FADV_DONTNEED)
        file.seek(tensor.begin)
        left = tensor.end - tensor.begin

        while left > 0:
            chunk = file.read(min(left, 1 << 24))
            if not chunk:  # the file is shorter than its header states: the digest will differ
                break
            digest.update(chunk)
            left -= len(chunk)

    return digest.hexdigest()


def tensor_digest(tensor: Tensor) -> str:
    """Return the sha256 of the bytes of a contiguous CPU tensor, as a safetensors file would hold them."""
    return hashlib.sha256(tensor.reshape(-1).view(torch.uint8).numpy().data).hexdigest()


def num_bytes(spec: TensorSpec) -> int:
    """Return the bytes of a tensor in a file."""
    return math.prod(spec.shape) * DTYPE_BITS[spec.dtype] // 8


def split_into_shards(tensors: Mapping[str, TensorSpec], max_shard_bytes: int) -> list[list[str]]:
    """Group names into shards of at most `max_shard_bytes`, in order. A larger tensor has a shard of its own."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, spec in tensors.items():
        if shards[-1] and filled + num_bytes(spec) > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += num_bytes(spec)

    return shards


@dataclass
class ShardWriter:
    """Take tensors in any order, hold those of unfinished shards, and write a shard when its last tensor has come."""

    folder: Path
    tensors: Mapping[str, TensorSpec]
    """The expected tensors. In this order they should come: then only one shard is held in memory."""
    max_shard_bytes: int
    digests: dict[str, str] = field(default_factory=dict)
    """The sha256 of each tensor's bytes, of those that have come."""

    def __post_init__(self) -> None:
        self._missing = [set(names) for names in split_into_shards(self.tensors, self.max_shard_bytes)]
        self._shard_of: dict[str, int] = {}
        for shard, names in enumerate(self._missing):
            self._shard_of.update(dict.fromkeys(names, shard))
        self._held: dict[int, dict[str, Tensor]] = {}

    def add(self, name: str, tensor: Tensor) -> None:
        """Take one tensor, which becomes a contiguous copy of its own on the CPU in the dtype of the file.

        Raises: CheckpointError when its shape is not the expected one, or when a float16 file cannot hold its values.
        """
        spec = self.tensors[name]
        if tuple(tensor.shape) != spec.shape:
            raise CheckpointError(f"{name} has another shape than in the base", found=tensor.shape, expected=spec.shape)

        # A copy of its own: several names may be views of one tensor, which its caller is about to free.
        copy = torch.empty(spec.shape, dtype=COPIED_DTYPES[spec.dtype]).copy_(tensor)
        if spec.dtype == "F16" and not copy.isfinite().all() and tensor.isfinite().all():
            raise CheckpointError(f"{name} holds values that float16 cannot", fix="trainer.export_dtype=bf16")

        self.digests[name] = tensor_digest(copy)

        shard = self._shard_of[name]
        self._held.setdefault(shard, {})[name] = copy
        self._missing[shard].discard(name)
        if not self._missing[shard]:
            self._write(shard)

    def finish(self) -> None:
        """Write the index. Raises: CheckpointError when a tensor did not come."""
        absent: set[str] = set().union(*self._missing)
        if absent:
            raise CheckpointError("the model did not give all its tensors", found=f"missing: {some(absent)}")
        if len(self._missing) == 1:
            return

        weight_map = {name: self._file_name(shard) for name, shard in sorted(self._shard_of.items())}
        index = {
            "metadata": {
                "total_parameters": sum(math.prod(spec.shape) for spec in self.tensors.values()),
                "total_size": sum(num_bytes(spec) for spec in self.tensors.values()),
            },
            "weight_map": weight_map,
        }
        (self.folder / INDEX_FILE).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")

    def _write(self, shard: int) -> None:
        write_tensors(self._held.pop(shard), self.folder / self._file_name(shard))

    def _file_name(self, shard: int) -> str:
        count = len(self._missing)
        if count == 1:
            return SINGLE_FILE
        return f"model-{shard + 1:05d}-of-{count:05d}.safetensors"


def some(names: Iterable[str]) -> str:
    """List the first few names, in order."""
    ordered = sorted(names)
    shown = ", ".join(ordered[:5]) or "none"
    if len(ordered) > 5:
        shown += ", …"
    return shown

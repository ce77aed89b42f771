"""Check that what is trained is what the base's files hold: before the start, when read, and when sharded."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from apollo_sft.checkpoint.model_folder.conversion import follow_names, plan_export
from apollo_sft.checkpoint.model_folder.tensor_files import (
    StoredTensor,
    read_tensors,
    read_whole,
    same_values,
    specs_of,
)
from apollo_sft.errors import ModelError
from apollo_sft.model import attention
from apollo_sft.model.load import build_on_meta
from apollo_sft.parallel.mesh import Mesh
from apollo_sft.train.precision import DTYPES
from apollo_sft.types import BaseModel

CHUNK = 1 << 16
"""Values of a tensor that a checksum takes at once on a CPU: they stay in its cache. Eight times as fast as 1 << 22."""
CHUNK_ON_DEVICE = 1 << 24
SPREAD = 0x9E3779B97F4A7C15 - (1 << 64)
"""An odd 64-bit number, the golden ratio's, which spreads positions over all bits. Source: Knuth, TAOCP 3, 6.4."""
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def untied_in_files(hf_config: Any, stored: Mapping[str, StoredTensor], trust_remote_code: bool) -> tuple[str, ...]:
    """Name the tensors in files that config.json makes one weight, and that differ: head and embeddings; () for none.

    The files decide: transformers 5 loads both then, and a model that is built from the config has only one.
    Raises: ModelError when other weights are one by the architecture and differ in the files.
    """
    rows = hf_config.get_text_config().vocab_size
    tables = [name for name, tensor in stored.items() if len(tensor.spec.shape) == 2 and tensor.spec.shape[0] == rows]
    if len(tables) < 2 or not getattr(hf_config, "tie_word_embeddings", False):
        return ()

    attention.register(attention.sdpa_kernel)  # its name must be known; nothing runs
    model = build_on_meta(hf_config, DTYPES["fp32"], trust_remote_code)
    state = model.state_dict(keep_vars=True)
    names: dict[int, list[str]] = defaultdict(list)
    for name, (memory, is_converted) in follow_names(model, stored).items():
        if memory in state and not is_converted:
            names[id(state[memory])].append(name)

    ends = {id(model.get_output_embeddings().weight), id(model.get_input_embeddings().weight)}
    untied: tuple[str, ...] = ()
    for parameter, shared in names.items():
        first, *others = shared
        if all(same_values(stored[first], stored[other]) for other in others):
            continue
        if parameter not in ends:
            raise ModelError(
                f"{type(model).__name__} makes one weight of tensors that differ in the files",
                found=", ".join(shared),
                fix="use the files of the original model, not of one that was merged or edited",
            )
        untied = tuple(shared)
    return untied


def check_as_built(loaded: Any, built: Any) -> None:
    """Compare the loaded model with one that is built from its config, as the other ranks build theirs.

    Names, shapes and shared weights must be the same.
    Raises: ModelError.
    """
    for what, found, expected in (
        ("parameters and buffers", _shapes(loaded), _shapes(built)),
        ("shared weights", _shared(loaded), _shared(built)),
    ):
        if found != expected:
            different = sorted(set(map(str, found)) ^ set(map(str, expected))) or ["other shapes"]
            raise ModelError(
                f"{type(loaded).__name__}: its files load into another model than its config describes",
                found=f"{what} differ: {', '.join(different[:4])}",
                expected="the same on every rank",
                fix="use config.json and weights of the same model",
            )


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in _tensors(model).items()}


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return all parameters, under each of their names, and buffers."""
    return {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}


def _shared(model: nn.Module) -> list[tuple[str, ...]]:
    """Return the names of each parameter that has several."""
    names: dict[int, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names[id(parameter)].append(name)
    return sorted(tuple(each) for each in names.values() if len(each) > 1)


@torch.no_grad()
def check_read(model: Any, folder: Path) -> None:
    """Compare every weight of a model that was just loaded, before anything is added, with the files in `folder`.

    Tensor by tensor, in the dtype of the model; tensors that transformers fuses while it loads are split again.
    Raises: ModelError.
    """
    stored = read_tensors(folder, follow_links=True)  # links were checked before, by model.follow_links
    plan = plan_export(model, BaseModel("", folder, {}, specs_of(stored)), "auto")
    state = model.state_dict(keep_vars=True)
    for group in plan.groups:
        made = group.split([state[name].detach() for name in group.sources])
        for name, held in read_whole(stored, group.targets):
            if not _equal(made[name], held.to(made[name].dtype)):
                raise ModelError(
                    f"{name} was not loaded as it is in the files of {folder}",
                    found="other values in the model",
                    fix="report it, with the model's name and the version of transformers",
                )


def _equal(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a, b) or torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)


def other_dtypes(model: nn.Module, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """Return the floating parameters and buffers of a loaded model that are not in `dtype`, by name, with their dtypes.

    transformers keeps some in float32, and buffers in the dtype of the files; a model that is built has all in one.
    """
    return {name: t.dtype for name, t in _tensors(model).items() if t.is_floating_point() and t.dtype != dtype}


def set_dtypes(model: nn.Module, dtypes: Mapping[str, torch.dtype]) -> None:
    """Give parameters and buffers of a model on meta, by name, other dtypes; in place."""
    tensors = _tensors(model)
    for name, dtype in dtypes.items():
        tensors[name].data = tensors[name].data.to(dtype)


@torch.no_grad()
def check_filled(
    held: Mapping[str, tuple[int, Tensor]], copies: Mapping[str, Tensor], source: nn.Module | None, mesh: Mesh
) -> None:
    """Compare the shards of all ranks with the model that rank 0 has read. Collective: all ranks raise, or none.

    `held`: by name, the flat position of this rank's first value of a parameter, and its values. `copies`: buffers, of
    which every rank holds all. `source`: rank 0's model.
    Raises: ModelError naming what has another checksum.
    """
    assert mesh.shard is not None
    names = [*held, *copies]
    device = torch.device(mesh.shard.device_type)

    # A checksum of a parameter is the sum of those of its shards: one small all-reduce, and no weight is gathered.
    shards = torch.stack([checksum(values, start, device) for start, values in held.values()])
    dist.all_reduce(shards, group=mesh.shard.get_group(mesh.shard.ndim - 1))
    found = torch.stack([*shards, *(checksum(buffer, 0, device) for buffer in copies.values())])

    expected = torch.zeros_like(found)
    if source is not None:
        weights = dict(source.named_parameters())
        buffers = dict(source.named_buffers())
        # In the dtype of the shard: FSDP1 holds a group of parameters in one dtype.
        sums = [checksum(weights[name].to(values.dtype), 0, device) for name, (_, values) in held.items()]
        expected = torch.stack([*sums, *(checksum(buffers[name], 0, device) for name in copies)])
    dist.broadcast(expected, src=0)

    differs = (found != expected).to(torch.int32)
    dist.all_reduce(differs, op=dist.ReduceOp.MAX)
    wrong = [name for name, bad in zip(names, differs.tolist(), strict=True) if bad]
    if wrong:
        raise ModelError(
            "the shards of the ranks do not hold the weights that rank 0 has read",
            found=f"{len(wrong)} of {len(names)} tensors differ: {', '.join(wrong[:3])}",
            fix="report it, with the model's name and the command",
        )


def checksum(values: Tensor, start: int, device: torch.device | None = None) -> Tensor:
    """Sum the bits of flat values, each times a number that depends on its place: int64, modulo 2^64, of shape ().

    The sums of the parts of a tensor add up to that of the tensor. `start`: the place of the first value in the tensor.
    `device`: where it is computed, piece by piece; None is the device of the values.
    """
    if device is None:
        device = values.device
    chunk = CHUNK_ON_DEVICE
    if device.type == "cpu":
        chunk = CHUNK
    bits = values.detach().reshape(-1).contiguous().view(INTEGERS[values.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=device)
    for at in range(0, bits.numel(), chunk):
        part = bits[at : at + chunk].to(device).long()
        places = torch.arange(start + at, start + at + part.numel(), device=device)
        # 1 is added to the bits, so that zeros count too; the factor is odd, so that no bit is lost.
        total += ((part + 1) * (places * SPREAD | 1)).sum()
    return total

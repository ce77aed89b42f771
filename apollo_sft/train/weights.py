"""What is trained is what the base's files hold: decided before the start, proven when read and when sharded."""

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

CHUNK = 1 << 22
"""Values of a tensor that a checksum takes at once."""
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
                fix="take the files of the model itself, not of one that was merged or edited",
            )
        untied = tuple(shared)
    return untied


def check_as_built(loaded: Any, built: Any) -> None:
    """Hold the model that was loaded against the one that the other ranks build: names, shapes, and what is shared.

    Raises: ModelError.
    """
    for what, found, expected in (
        ("parameters", _shapes(loaded), _shapes(built)),
        ("shared weights", _shared(loaded), _shared(built)),
    ):
        if found != expected:
            odd = sorted(set(map(str, found)) ^ set(map(str, expected))) or ["other shapes"]
            raise ModelError(
                f"{type(loaded).__name__}: its files load into another model than its config describes",
                found=f"{what} differ: {', '.join(odd[:4])}",
                expected="the same on every rank",
                fix="config.json and the weights must be of one model",
            )


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(p.shape) for name, p in model.named_parameters(remove_duplicate=False)}


def _shared(model: nn.Module) -> list[tuple[str, ...]]:
    """The names of each parameter that has several."""
    names: dict[int, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names[id(parameter)].append(name)
    return sorted(tuple(each) for each in names.values() if len(each) > 1)


@torch.no_grad()
def check_read(model: Any, folder: Path, config: Mapping[str, Any]) -> None:
    """Hold every weight of a model that was just loaded, before anything is added, against the files in `folder`.

    Tensor by tensor, in the dtype of the model; what transformers fuses while it loads is taken apart again.
    Raises: ModelError.
    """
    stored = read_tensors(folder, follow_links=True)  # looked at before, by the user's own rule
    plan = plan_export(model, BaseModel("", folder, dict(config), specs_of(stored)), "auto")
    state = model.state_dict(keep_vars=True)
    for group in plan.groups:
        made = group.split([state[name].detach() for name in group.sources])
        for name, held in read_whole(stored, group.targets):
            if not _equal(made[name], held.to(made[name].dtype)):
                raise ModelError(
                    f"{name} was not loaded as it stands in the files of {folder}",
                    found="other values in the model",
                    fix="report it, with the model's name and the version of transformers",
                )


def _equal(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a, b) or torch.equal(a.nan_to_num(), b.nan_to_num())


@torch.no_grad()
def check_filled(held: Mapping[str, tuple[int, Tensor]], source: nn.Module | None, mesh: Mesh) -> None:
    """Hold the shards of all ranks against the model that rank 0 has read. Collective: all ranks raise, or none.

    `held`: by name, the flat position of this rank's first value of a parameter, and its values. `source`: rank 0's.
    Raises: ModelError naming parameters whose checksums differ.
    """
    assert mesh.shard is not None
    names = list(held)
    device = torch.device(mesh.shard.device_type)
    found = torch.stack([checksum(values, start).to(device) for start, values in held.values()])
    dist.all_reduce(found, group=mesh.shard.get_group(mesh.shard.ndim - 1))
    expected = torch.zeros_like(found)
    if source is not None:
        weights = dict(source.named_parameters())
        expected = torch.stack([checksum(weights[name], 0) for name in names]).to(device)
    dist.broadcast(expected, src=0)
    differs = (found != expected).to(torch.int32)
    dist.all_reduce(differs, op=dist.ReduceOp.MAX)
    wrong = [name for name, bad in zip(names, differs.tolist(), strict=True) if bad]
    if wrong:
        raise ModelError(
            "the shards of the ranks do not hold the weights that rank 0 has read",
            found=f"{len(wrong)} of {len(names)} parameters differ: {', '.join(wrong[:3])}",
            fix="report it, with the model's name and the command",
        )


def checksum(values: Tensor, start: int) -> Tensor:
    """Sum the bits of flat values, each times a number of its place: int64, modulo 2^64, of shape ().

    The sums of the parts of a tensor add up to that of the whole. `start`: the place of the first value in the whole.
    """
    bits = values.detach().reshape(-1).contiguous().view(INTEGERS[values.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=values.device)
    for at in range(0, bits.numel(), CHUNK):
        part = bits[at : at + CHUNK].long()
        places = torch.arange(start + at, start + at + part.numel(), device=part.device)
        total += ((part + 1) * (places * SPREAD | 1)).sum()
    return total

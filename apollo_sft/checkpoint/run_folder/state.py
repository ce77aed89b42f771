"""The training state of a run on disk: trained weights, optimizer and random states, as safetensors and one JSON file.

Every rank writes and reads its own shards through PyTorch DCP, which also reshards for another number of ranks. Nothing
is pickled: DCP's own default form would be.
"""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.optim import Optimizer

from apollo_sft.checkpoint.run_folder.resume import PARTS, STATE
from apollo_sft.errors import CheckpointError

STEP = "step"
"""The entry of an optimizer's state with the number of steps. It is not saved: state.json has the run's number."""
MAX_FILE_BYTES = 4_000_000_000
"""The size limit of one file of one rank: DCP holds a second copy of a file in memory while it writes it."""
OFFSETS = "DCP_SHARDING_INFO"
"""The entry in the metadata of DCP's safetensors files that names which part of each tensor they hold."""


def snapshot(model: nn.Module, optimizer: Optimizer, parts: Collection[str], copy: bool) -> dict[str, Tensor]:
    """Collect this rank's shards of the tensors of a checkpoint, by name.

    `copy`: into CPU memory of their own, so that training may continue while they are written. Without it, the live
    tensors are returned.
    """
    tensors = _tensors(model, optimizer, parts)
    if copy:
        tensors = {name: tensor.to("cpu", copy=True) for name, tensor in tensors.items()}

    if "extra" in parts:
        tensors |= _random_states()

    return tensors


def num_bytes(model: nn.Module, moments: int, parts: Collection[str], local: bool = False) -> int:
    """Return the bytes of a checkpoint; `local`: of this rank's part. Known before the first step, on meta too.

    `moments`: the bytes of the optimizer's state.
    """
    total = 0
    if "model" in parts:
        for parameter in _trained(model).values():
            held = getattr(parameter, "_local_tensor", parameter) if local else parameter
            total += held.numel() * held.element_size()

    if "optimizer" in parts:
        total += moments

    return total


def write_state(
    folder: Path, tensors: dict[str, Tensor], facts: Mapping[str, Any], is_writer: bool, group: Any = None
) -> None:
    """Write a snapshot into the folder. Collective over `group`. `facts` go into state.json, see `resume.read_facts`.

    Raises: CheckpointError on every rank when one could not write.
    """
    writer = HuggingFaceStorageWriter(str(folder), fqn_to_index_mapping=_files(tensors), save_distributed=True)
    try:
        save(tensors, storage_writer=writer, process_group=group, no_dist=not dist.is_initialized())
    except CheckpointException as error:
        # It derives from BaseException, so that handlers further up would not catch it.
        rank, (cause, _) = min(error.failures.items(), key=lambda item: item[0])
        raise CheckpointError(f"rank {rank} could not write into {folder}", found=repr(cause)) from cause

    if is_writer:
        (folder / STATE).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def _files(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Return the number of the file that each tensor goes to, from 1, the same on every rank."""
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    files: dict[str, int] = {}
    # The random states of all ranks get an entry here too: the mapping must be the same everywhere.
    for rank in range(ranks):
        files[f"random/{rank}"] = 1
        files[f"random/{rank}/cuda"] = 1

    number = 1
    filled = 0
    for name, tensor in tensors.items():
        if name in files:
            continue

        size = tensor.numel() * tensor.element_size() // ranks
        if filled and filled + size > MAX_FILE_BYTES:
            filled = 0
            number += 1

        files[name] = number
        filled += size

    return files


@torch.no_grad()
def read_state(folder: Path, model: nn.Module, optimizer: Optimizer, steps: int, same_ranks: bool) -> None:
    """Fill model and optimizer, which has its state, in place from a folder of `write_state`, on any number of ranks.

    Collective. `steps`: optimizer steps done. `same_ranks`: as many ranks as wrote it, so that each takes its random
    state back.
    Raises: CheckpointError when the files do not hold what this model needs.
    """
    for state in optimizer.state.values():
        if STEP in state:
            state[STEP].fill_(steps)

    tensors = _tensors(model, optimizer, PARTS)
    random_states = _random_states() if same_ranks else {}
    tensors |= random_states

    try:
        load(tensors, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=not dist.is_initialized())
    except (CheckpointException, RuntimeError, ValueError, OSError, KeyError) as error:
        raise CheckpointError(
            f"{folder} does not hold this model's state", found=str(error).splitlines()[-1]
        ) from error

    # Weights and moments were filled in place; generators keep their state outside of any tensor.
    for name in random_states:
        if name.endswith("/cuda"):
            torch.cuda.set_rng_state(tensors[name])
        else:
            torch.set_rng_state(tensors[name])


class StateFiles:
    """Read the full tensors in a folder of `write_state`, one at a time, in one process alone.

    Raises: CheckpointError when a file cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._parts: dict[str, list[tuple[Path, list[int]]]] = defaultdict(list)
        for path in sorted(folder.glob("*.safetensors")):
            with safe_open(path, "pt") as file:
                for name, part in json.loads(file.metadata()[OFFSETS]).items():
                    self._parts[name].append((path, part["saved_offsets"]))

    def read(self, name: str) -> Tensor:
        """Read one tensor to the CPU, in the dtype in which it was trained.

        Raises: CheckpointError when a part of it is missing.
        """
        parts: list[tuple[list[int], Tensor]] = []
        for path, offsets in self._parts.get(name, []):
            with safe_open(path, "pt") as file:
                parts.append((offsets, file.get_tensor(name)))

        if len(parts) == 1:
            return parts[0][1]

        # Each part is a block of the tensor: its first place along every dim, and its sizes.
        ends = [[at + size for at, size in zip(offsets, part.shape, strict=True)] for offsets, part in parts]
        shape = [max(sizes) for sizes in zip(*ends, strict=True)]
        if not parts or sum(part.numel() for _, part in parts) != torch.Size(shape).numel():
            raise CheckpointError(f"{self._folder} does not hold all of {name}")

        whole = torch.empty(shape, dtype=parts[0][1].dtype)
        for (offsets, part), stops in zip(parts, ends, strict=True):
            block = tuple(slice(at, stop) for at, stop in zip(offsets, stops, strict=True))
            whole[block] = part

        return whole


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the trained parameters by name; a tied weight once, under its first name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def _tensors(model: nn.Module, optimizer: Optimizer, parts: Collection[str]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for name, parameter in _trained(model).items():
        if "model" in parts:
            tensors[f"model/{name}"] = parameter.detach()

        if "optimizer" in parts:
            moments = optimizer.state[parameter].items()
            tensors |= {f"optim/{name}/{moment}": value for moment, value in moments if moment != STEP}

    return tensors


def _random_states() -> dict[str, Tensor]:
    """Return the states of this rank's generators, under names of its own."""
    name = f"random/{os.environ.get('RANK', '0')}"
    states = {name: torch.get_rng_state()}
    # The device of the weights does not decide: offloaded weights are on the CPU, but dropout is drawn on the GPU.
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        states[f"{name}/cuda"] = torch.cuda.get_rng_state()
    return states

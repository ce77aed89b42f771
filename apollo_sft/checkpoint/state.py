"""The training state of a run on disk: trained weights, optimizer and random states, as safetensors and one JSON file.

Every rank writes and reads its own shards through PyTorch DCP, which also reshards for another number of ranks. Nothing
is pickled: DCP's own default form would be.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.optim import Optimizer

from apollo_sft.errors import CheckpointError

STATE = "state.json"
MOMENTS = ("exp_avg", "exp_avg_sq")


def write_state(folder: Path, model: nn.Module, optimizer: Optimizer, facts: dict[str, Any], is_writer: bool) -> None:
    """Write into the empty folder. Collective. `facts` go into state.json and come back from `read_facts`."""
    tensors = _tensors(model, optimizer) | {_random_name(): torch.get_rng_state()}
    device = next(model.parameters()).device
    if device.type == "cuda":
        tensors[f"{_random_name()}/cuda"] = torch.cuda.get_rng_state(device)
    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    save(tensors, storage_writer=writer, no_dist=not dist.is_initialized())
    if is_writer:
        (folder / STATE).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def read_facts(folder: Path) -> dict[str, Any]:
    """What `write_state` was given. Raises: CheckpointError."""
    try:
        facts: dict[str, Any] = json.loads((folder / STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder / STATE} cannot be read", found=error) from error
    return facts


@torch.no_grad()
def read_state(folder: Path, model: nn.Module, optimizer: Optimizer, steps: int, same_ranks: bool) -> None:
    """Fill model and optimizer in place from a folder of `write_state`, on any number of ranks. Collective.

    `steps`: optimizer steps done. `same_ranks`: as many ranks as wrote it, so that each takes its random state back.
    Raises: CheckpointError when the files do not hold what this model needs.
    """
    for parameter in _trained(model).values():
        optimizer.state[parameter] = {name: torch.zeros_like(parameter) for name in MOMENTS}
        optimizer.state[parameter]["step"] = torch.tensor(float(steps))
    tensors = _tensors(model, optimizer)
    device = next(model.parameters()).device
    if same_ranks:
        tensors[_random_name()] = torch.get_rng_state()
        if device.type == "cuda":
            tensors[f"{_random_name()}/cuda"] = torch.cuda.get_rng_state(device)
    try:
        load(tensors, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=not dist.is_initialized())
    except (CheckpointException, RuntimeError, ValueError, OSError, KeyError) as error:
        raise CheckpointError(
            f"{folder} does not hold this model's state", found=str(error).splitlines()[-1]
        ) from error
    if same_ranks:
        torch.set_rng_state(tensors[_random_name()])
        if device.type == "cuda":
            torch.cuda.set_rng_state(tensors[f"{_random_name()}/cuda"], device)


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """A tied weight once, under its first name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def _tensors(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for name, parameter in _trained(model).items():
        tensors[f"model/{name}"] = parameter.detach()
        for moment in MOMENTS:
            tensors[f"optim/{name}/{moment}"] = optimizer.state[parameter][moment]
    return tensors


def _random_name() -> str:
    return f"random/{os.environ.get('RANK', '0')}"

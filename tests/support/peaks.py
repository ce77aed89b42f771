"""The most bytes of tensors that live in a step, by torch's own tracker."""

import gc
from pathlib import Path
from typing import Any

import torch
from torch.distributed._tools.mem_tracker import MemTracker

from apollo_sft.config.compose import compose
from apollo_sft.data.batch.loader import StepBatch, pack
from apollo_sft.data.store.store_files import SampleStore
from apollo_sft.model import load
from apollo_sft.parallel.launch import World
from apollo_sft.parallel.mesh import build_mesh
from apollo_sft.train.assemble import assemble
from apollo_sft.train.sharding import needs_group
from apollo_sft.train.step import train_step
from apollo_sft.types import Sample

BASE = ["data.train_files=none", "data.val_files=null"]
MICRO_BATCHES = 2


class Totals(MemTracker):
    """What it notes module by module knows one forward alone, and no frozen parameters. Totals need none of it."""

    def _nothing(self, *_: Any) -> None: ...

    _pre_fw_hook = _post_fw_hook = _pre_bw_hook = _post_bw_hook = _nothing


def needs_a_group(cells: list[list[str]]) -> bool:
    """Whether one process alone has to have a group for one of them."""
    return any(needs_group(compose([*BASE, *keys]).config.model, on_cuda=False) for _, *keys in cells)


def peaks(world: World, folder: Path, cells: list[list[str]]) -> list[int]:
    """On every rank. `cells`: names of a model, then the keys of a layout."""
    store = SampleStore(folder / "store")
    samples = [store[i] for i in range(len(store))]
    return [_peak(folder / name, keys, samples, world) for name, *keys in cells]


def _peak(folder: Path, keys: list[str], samples: list[Sample], world: World) -> int:
    config = compose([*BASE, f"model.partial_pretrain={folder}", *keys]).config
    sp = config.ulysses_sequence_parallel_size
    hf_config = load.read_config(folder, False)
    mesh = build_mesh(world, sp, config.model.fsdp_config.fsdp_size)
    model, optimizer = assemble(config, folder, hf_config, world, mesh)
    micro = pack(samples, multiple=sp)
    tokens = micro.input_ids.numel()
    batch = StepBatch(0, 0, [micro] * MICRO_BATCHES, [[]] * MICRO_BATCHES, 1, micro.num_targets, tokens)
    train_step(model, optimizer, batch, world, 1.0)
    tracker = Totals()
    tracker.track_external(model, optimizer)
    with tracker:
        train_step(model, optimizer, batch, world, 1.0)
    peak: int = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]
    del model, optimizer, tracker
    gc.collect()
    return peak

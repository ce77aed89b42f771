"""One process of `test_optimizers`: steps by muon and adamw_8bit in fp64. Rank 0 writes figures and weights."""

import gc
import json
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from safetensors.torch import save_file

from apollo_sft.checkpoint.run_folder.resume import folder_of
from apollo_sft.parallel import launch
from apollo_sft.parallel.launch import World
from tests.ranks.strategies_worker import DOUBLE, STEPS, Training
from tests.support.oracle import whole

OFFLOAD = "model.fsdp_config.cpu_offload=true"


def cell(folder: Path, model: str, optimizer: str, world: World) -> dict[str, Any]:
    """All steps in one piece, with a checkpoint in the middle; then on from there, and from that of two ranks."""
    keys = [DOUBLE, f"optim.name={optimizer}"]
    one = Training(folder, model, "fsdp2", world, *keys)
    one.checkpoints.folder = folder / f"{model}-{optimizer}-{world.size}" / "checkpoints"
    first = one.steps(0, STEPS // 2)
    one.save(STEPS // 2)
    figures = first + one.steps(STEPS // 2, STEPS)
    again = Training(folder, model, "fsdp2", world, *keys)
    again.checkpoints.folder = one.checkpoints.folder
    again.go_on(STEPS // 2)
    rest = again.steps(STEPS // 2, STEPS)
    weights, state = one.weights(), one.state()
    found = {
        "figures": figures,
        "resumed": rest == figures[len(first) :],
        "same": all(torch.equal(weights[name], weight) for name, weight in again.weights().items()),
        "state": {name.rpartition("/")[2]: str(value.dtype) for name, value in state.items()},
        "moments": sorted(name for name in state if name.startswith("optim/")),
    }
    if world.is_main:
        save_file(
            {name: w.contiguous() for name, w in weights.items()}, folder / f"{model}-{optimizer}-{world.size}.st"
        )
    elsewhere = folder / f"{model}-{optimizer}-2" / "checkpoints"
    if world.size == 1 and elsewhere.is_dir():
        there = Training(folder, model, "fsdp2", world, *keys)
        there.checkpoints.begin(folder_of(elsewhere, STEPS // 2), there.model, there.optimizer)
        found["from two ranks"] = there.steps(STEPS // 2, STEPS)
    return found


def main(out: Path, folder: Path, cells: list[str]) -> None:
    world = launch.start("cpu", needs_group=False)
    found: dict[str, Any] = {}
    for name in cells:
        optimizer, model = name.split()
        found[name] = cell(folder, model, optimizer, world)
        gc.collect()
    plain = Training(folder, "tied", "fsdp2", world, DOUBLE, "optim.name=muon")
    moved = Training(folder, "tied", "fsdp2", world, DOUBLE, "optim.name=muon", OFFLOAD)
    figures = [plain.steps(0, 2), moved.steps(0, 2)]
    pairs = zip(plain.model.parameters(), moved.model.parameters(), strict=True)
    found["offload"] = [figures[0] == figures[1], all(torch.equal(whole(a), whole(b)) for a, b in pairs)]
    if world.is_main:
        out.write_text(json.dumps(found))
    gc.collect()
    launch.stop()
    os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])

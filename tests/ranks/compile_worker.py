"""One process of `test_compile`: the same steps with layers compiled and not. Rank 0 writes."""

import gc
import json
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from apollo_sft.parallel import launch
from apollo_sft.parallel.launch import World
from tests.ranks.strategies_worker import Training
from tests.support.oracle import worst_difference

COMPILE = "model.compile=true"
CHECKPOINTING = "model.enable_gradient_checkpointing=true"


def cell(folder: Path, model: str, world: World, *more: str) -> dict[str, Any]:
    """Two steps of both, and what a checkpoint of each is called."""
    runs = [Training(folder, model, "fsdp2", world, *more, *keys) for keys in ((), (COMPILE,))]
    figures = [run.steps(0, 2) for run in runs]
    weights = [run.weights() for run in runs]
    return {
        "figures": max(abs(a - b) / a for a, b in zip(*figures, strict=True)),
        "weights": worst_difference(weights[1], weights[0]),
        "names": [sorted(run.state()) for run in runs],
    }


def main(out: Path, folder: Path, cells: list[str]) -> None:
    world = launch.start("cpu", needs_group=False)
    found = {}
    for name in cells:
        model, *more = name.split()
        found[name] = cell(folder, model, world, *more)
        gc.collect()
    if world.is_main:
        out.write_text(json.dumps(found))
    launch.stop()
    os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])

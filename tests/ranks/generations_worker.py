"""One process of `test_generations`: what sharded models say to the same prompts under every layout. Rank 0 writes."""

import gc
import json
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from apollo_sft.config.compose import compose
from apollo_sft.model import load
from apollo_sft.parallel import launch
from apollo_sft.parallel.launch import World
from apollo_sft.parallel.mesh import build_mesh
from apollo_sft.train.assemble import assemble
from apollo_sft.train.generations import continuations

SP = "ulysses_sequence_parallel_size=2"
FSDP1 = "model.strategy=fsdp"
LAYOUTS: dict[str, tuple[str, list[str]]] = {
    "data ranks": ("untied", []),
    "tied": ("tied", []),
    "sequence ranks": ("untied", [SP]),
    "fsdp1": ("untied", [FSDP1]),
    "fsdp1, tied, sequence ranks": ("tied", [FSDP1, SP]),
    "offload": ("untied", ["model.fsdp_config.cpu_offload=true"]),
    "adapter": ("lora", []),
    "adapter, sequence ranks": ("lora", [SP]),
}


def said(folder: Path, name: str, more: list[str], world: World, asked: dict[str, Any]) -> Any:
    base = folder / name
    keys = [f"model.partial_pretrain={base}", "data.train_files=none", "data.val_files=null", *more]
    keys += [f"model.lora_adapter_path={base / 'adapter'}"] if name == "lora" else []
    config = compose(keys).config
    mesh = build_mesh(world, config.ulysses_sequence_parallel_size)
    model, _ = assemble(config, base, load.read_config(base, False), world, mesh)
    stops = frozenset(asked["stops"][name])
    found = continuations(model, asked["prompts"], stops, world, asked["limit"])
    assert model.training
    assert continuations(model, asked["prompts"], stops, world, stopped=lambda: True) is None
    return found


def main(out: Path, folder: Path) -> None:
    world = launch.start("cpu", needs_group=True)
    asked = json.loads((folder / "asked.json").read_text())
    found = {layout: said(folder, name, more, world, asked) for layout, (name, more) in LAYOUTS.items()}
    if world.is_main:
        out.write_text(json.dumps(found))
    gc.collect()
    launch.stop()
    os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))

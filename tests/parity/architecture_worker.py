"""One process of `test_architectures`: every architecture under sequence parallelism against one process, in fp64."""

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import torch.distributed as dist

from apollo_sft.config.compose import compose
from apollo_sft.data.batch.loader import pack
from apollo_sft.model import attention, load
from apollo_sft.model.sft_model import SftModel
from apollo_sft.parallel import launch
from apollo_sft.parallel.launch import World
from apollo_sft.parallel.mesh import build_mesh
from apollo_sft.tools.verify.oracle import StaysDouble
from apollo_sft.train.assemble import assemble
from tests.support.architectures import (
    Gradients,
    documents,
    load_case,
    run_packed,
    save_case,
    worst_difference,
)


def assembled(place: Path, world: World) -> SftModel:
    """The model as a run has it: built without memory, sharded, filled from rank 0, its row cut over all ranks."""
    keys = [f"model.partial_pretrain={place}", "data.train_files=none", "data.val_files=null"]
    keys += ["model.fsdp_config.model_dtype=fp64", f"ulysses_sequence_parallel_size={world.size}"]
    config = compose(keys).config
    mesh = build_mesh(world, world.size, config.model.fsdp_config.fsdp_size)
    model, _ = assemble(config, place, load.read_config(place, False), world, mesh)
    return model.eval()


def gather(part: tuple[float, Gradients], size: int) -> tuple[float, Gradients]:
    """The sum over ranks. Sharding averages gradients."""
    loss = torch.tensor(part[0], dtype=torch.float64)
    dist.all_reduce(loss)
    return float(loss), {name: gradient.full_tensor() * size for name, gradient in part[1].items()}


def main(out: Path, folder: Path, names: list[str]) -> None:
    world = launch.start("cpu", needs_group=True)
    micro_batch = pack(documents(), multiple=world.size)
    figures = {}
    for name in names:
        attention.register(attention.sdpa_kernel)
        place = save_case(folder, name)
        with StaysDouble():
            whole = run_packed(SftModel(load_case(place)), micro_batch)
        model = assembled(place, world)
        with StaysDouble():
            sliced = gather(run_packed(model, micro_batch), world.size)
        figures[name] = worst_difference(sliced, whole)
    if world.is_main:
        out.write_text(json.dumps(figures))
    launch.stop()
    os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), json.loads(Path(sys.argv[3]).read_text()))

"""One process of `test_architectures`: every architecture under sequence parallelism against one process, in fp64."""

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import torch.distributed as dist

from apollo_sft.data.pack import pack
from apollo_sft.model import attention
from apollo_sft.model.sft_model import SftModel
from apollo_sft.parallel.ulysses import Ulysses
from tests.support.architectures import (
    Gradients,
    StaysDouble,
    documents,
    load_case,
    run_packed,
    save_case,
    worst_difference,
)


def add_ranks(part: tuple[float, Gradients]) -> tuple[float, Gradients]:
    loss = torch.tensor(part[0], dtype=torch.float64)
    for tensor in (loss, *part[1].values()):
        dist.all_reduce(tensor)
    return float(loss), part[1]


def main(out: Path, folder: Path, names: list[str]) -> None:
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    micro_batch = pack(documents(), multiple=size)
    figures = {}
    for name in names:
        attention.register(attention.sdpa_kernel)
        causal_lm = load_case(save_case(folder, name))
        with StaysDouble():
            whole = run_packed(SftModel(causal_lm), micro_batch)
            attention.register(attention.sdpa_kernel, Ulysses(dist.group.WORLD, rank, size))
            sliced = add_ranks(run_packed(SftModel(causal_lm, rank, size), micro_batch))
        figures[name] = worst_difference(sliced, whole)
    if rank == 0:
        out.write_text(json.dumps(figures))
    dist.barrier()
    os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), json.loads(Path(sys.argv[3]).read_text()))

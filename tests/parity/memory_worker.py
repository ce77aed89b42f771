"""One process of `test_memory`: what a rank holds at sequence sizes 1, 2 and 4 of the same pack. Rank 0 writes.

One chunk of the head takes all targets, so that the logits a rank forms are the logits it holds.
"""

import gc
import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from apollo_sft.config.compose import compose
from apollo_sft.data.batch.loader import StepBatch, pack
from apollo_sft.data.store.store_files import SampleStore
from apollo_sft.model import head, load
from apollo_sft.parallel import launch
from apollo_sft.parallel.mesh import build_mesh
from apollo_sft.train.assemble import assemble
from apollo_sft.train.step import train_step
from bench.memory import counted


def main(out: Path, folder: Path, names: list[str]) -> None:
    head.CHUNK_ROWS = 1024
    world = launch.start("cpu", needs_group=True)
    store = SampleStore(folder / "store")
    samples = [store[i] for i in range(len(store))]
    figures: dict[str, dict[int, list[int]]] = {}
    for name in names:
        for sp in (1, 2, 4):
            keys = [f"model.partial_pretrain={folder / name}", "data.train_files=none", "data.val_files=null"]
            config = compose([*keys, f"ulysses_sequence_parallel_size={sp}"]).config
            hf_config = load.read_config(folder / name, False)
            model, optimizer = assemble(config, folder / name, hf_config, world, build_mesh(world, sp))
            micro_batch = pack(samples, multiple=sp)
            batch = StepBatch(0, 0, [micro_batch], [[]], 1, micro_batch.num_targets, micro_batch.input_ids.numel())
            with counted(model.causal_lm.base_model, hf_config.vocab_size) as memory:
                train_step(model, optimizer, batch, world, None)
            figures.setdefault(name, {})[sp] = [memory.activations.most, memory.logits.most, memory.all.most]
            del model, optimizer
            gc.collect()
    if world.is_main:
        out.write_text(json.dumps(figures))
    launch.stop()
    os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3]))

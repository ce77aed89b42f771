"""What layouts cost over one rank: time and memory of a step, as ratios.

    python bench/layouts.py [--hidden N] [--layers N] [--tokens N] [--steps N] [--ranks N]

A Qwen2-style model with random weights, and one batch of documents, the same for every layout. On CUDA when there are
as many devices as `--ranks`, else on CPU by gloo, where ranks share the cores: there the times say what a layout adds.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from memory import counted

from apollo_sft.config.compose import compose
from apollo_sft.data.batch.loader import Loader
from apollo_sft.data.store.store_files import SampleStore, StoreSummary, StoreWriter
from apollo_sft.model import load
from apollo_sft.parallel import launch
from apollo_sft.parallel.mesh import build_mesh
from apollo_sft.train.assemble import assemble
from apollo_sft.train.loaders import plan_spec
from apollo_sft.train.step import train_step
from apollo_sft.types import IGNORE_INDEX, RowRef, Sample

VOCABULARY, LONGEST, ROWS = 8192, 512, 8
SP2, FSDP1 = "ulysses_sequence_parallel_size=2", "model.strategy=fsdp"
LAYOUTS: dict[str, tuple[int, list[str]]] = {
    "one rank": (1, []),
    "2 ranks, fsdp2": (2, []),
    "2 ranks, fsdp": (2, [FSDP1]),
    "sp 2, fsdp2": (2, [SP2]),
    "sp 2, fsdp": (2, [SP2, FSDP1]),
    "4 ranks, fsdp2": (4, []),
    "4 ranks, HSDP 2 x 2": (4, ["model.fsdp_config.fsdp_size=2"]),
    "4 ranks, dp 2 x sp 2": (4, [SP2]),
}


def write_inputs(folder: Path, options: argparse.Namespace) -> None:
    """A model, and documents of different lengths, all of whose tokens are targets."""
    from transformers import AutoModelForCausalLM, Qwen2Config
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=options.hidden,
        intermediate_size=4 * options.hidden,
        num_hidden_layers=options.layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=max(LONGEST, options.tokens),
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "model")
    rng = np.random.default_rng(0)
    shares = rng.dirichlet(np.full(ROWS, 4.0))
    (folder / "store").mkdir()
    writer = StoreWriter(folder / "store", ["rows"])
    summary = StoreSummary(["rows"], num_rows=ROWS, num_samples=ROWS)
    for row, share in enumerate(shares):
        ids = rng.integers(0, VOCABULARY, max(2, int(share * options.tokens))).astype(np.int32)
        writer.add(Sample(ids, np.append(ids[1:], np.int32(IGNORE_INDEX)), RowRef("rows", row), (1,)))
        summary.num_tokens += len(ids)
        summary.num_targets += len(ids) - 1
    writer.finish("bench", summary)


def measure(folder: Path, out: Path, num_steps: int, ranks: int) -> None:
    """All layouts of this number of processes. The first step is not timed; the last one counts bytes, untimed."""
    on_cuda = torch.cuda.device_count() >= ranks
    world = launch.start("cuda" if on_cuda else "cpu", needs_group=on_cuda)  # bf16 is the sharding's work
    store = SampleStore(folder / "store")
    for name, (wanted, more) in LAYOUTS.items():
        if wanted != world.size:
            continue
        keys = [f"model.partial_pretrain={folder / 'model'}", "data.train_files=none", "data.val_files=null"]
        keys += [f"data.train_batch_size={ROWS}", "data.micro_batch_size_per_gpu=2", "data.balance_dp_token=true"]
        config = compose([*keys, *more]).config
        hf_config = load.read_config(folder / "model", False)
        mesh = build_mesh(world, config.ulysses_sequence_parallel_size, config.model.fsdp_config.fsdp_size)
        model, optimizer = assemble(config, folder / "model", hf_config, world, mesh)
        loader = Loader(store, plan_spec(config.data, config.trainer.seed, mesh, hf_config), mesh.dp_rank, mesh.sp_size)
        batch = loader.batch(0)
        train_step(model, optimizer, batch, world, None)
        began = time.perf_counter()
        for _ in range(num_steps):
            train_step(model, optimizer, batch, world, None)
        if on_cuda:
            torch.cuda.synchronize()
        seconds = (time.perf_counter() - began) / num_steps
        optimizer.zero_grad(set_to_none=True)
        with counted(model.causal_lm.base_model, VOCABULARY) as memory:
            result = train_step(model, optimizer, batch, world, None)
        figures = {"seconds": seconds, "activations": memory.activations.most, "logits": memory.logits.most}
        figures |= {
            "allocated": result.peak_bytes if on_cuda else memory.all.most,
            "weights": held(model.parameters()),
            "loss": result.loss,
        }
        if world.is_main:
            with out.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"name": name, "device": world.device.type} | figures) + "\n")
        del model, optimizer
        gc.collect()
    launch.stop()
    os._exit(0)


def held(parameters: Any) -> int:
    """Bytes of this rank's shards."""
    local = (p.to_local() if hasattr(p, "to_local") else p for p in parameters)
    return sum(tensor.numel() * tensor.element_size() for tensor in local)


def show(figures: dict[str, Any], one: dict[str, Any]) -> None:
    cells = [f"{figures['seconds'] / one['seconds']:.2f}"]
    cells += [f"{figures[key] / one[key]:.2f}" for key in ("weights", "activations", "logits", "allocated")]
    print(f"{figures['name']:<22}" + "".join(f"{cell:>13}" for cell in cells), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=2048, help="of a batch")
    parser.add_argument("--steps", type=int, default=5, help="timed steps of each layout")
    parser.add_argument("--ranks", type=int, default=4, choices=[1, 2, 4], help="most processes")
    parser.add_argument("--worker", nargs=2, metavar=("FOLDER", "OUT"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        measure(Path(options.worker[0]), Path(options.worker[1]), options.steps, options.ranks)
    with tempfile.TemporaryDirectory() as name:
        folder, out, shown, one = Path(name), Path(name) / "figures.jsonl", 0, None
        write_inputs(folder, options)
        for processes in [size for size in (1, 2, 4) if size <= options.ranks]:
            start = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
            command = [sys.executable, *start, __file__, *sys.argv[1:], "--worker", name, str(out)]
            environment = os.environ | {"OMP_NUM_THREADS": "1"}
            finished = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
            if finished.returncode:
                sys.exit(finished.stderr)
            lines = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
            if one is None:
                one = lines[0]
                print(f"{one['device']}, one rank: {one['seconds'] * 1e3:.0f} ms a step; a rank keeps or allocates")
                sizes = (
                    f"{key} {one[key] / 2**20:.1f} MB" for key in ("weights", "activations", "logits", "allocated")
                )
                print(f"{', '.join(sizes)}. Per rank, over one rank:\n")
                titles = ("time", "weights", "activations", "logits", "allocated")
                print(f"{'':<22}" + "".join(f"{title:>13}" for title in titles))
            for figures in lines[shown:]:
                show(figures, one)
            shown = len(lines)


if __name__ == "__main__":
    main()

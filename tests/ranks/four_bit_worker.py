"""One process of `test_four_bit`: LoRA over a base in 4 bits, and over weights that are what it stands for."""

import gc
import hashlib
import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from safetensors.torch import save_file
from torch import Tensor

from apollo_sft.checkpoint.model_folder.rounding import cast
from apollo_sft.checkpoint.model_folder.write import save_model
from apollo_sft.checkpoint.run_folder.resume import folder_of
from apollo_sft.config.compose import compose, recorded
from apollo_sft.data.batch.loader import Loader
from apollo_sft.data.store.store_files import SampleStore
from apollo_sft.model import load
from apollo_sft.model.four_bit import four_bit_modules
from apollo_sft.model.lora import merge
from apollo_sft.parallel import launch
from apollo_sft.parallel.launch import World
from apollo_sft.parallel.mesh import build_mesh
from apollo_sft.train.assemble import assemble
from apollo_sft.train.checkpoints import Checkpoints
from apollo_sft.train.loaders import plan_spec
from apollo_sft.train.merged import check_merged, live_loss, probe_of
from apollo_sft.train.step import train_step
from apollo_sft.train.validation import evaluate
from tests.support.exports import open_base, options
from tests.support.oracle import whole

BASE = ["data.train_files=none", "data.val_files=null", "data.train_batch_size=8", "data.micro_batch_size_per_gpu=2"]
BASE += ["data.chat_template=plain", "optim.lr=1e-2"]
FP32 = "model.fsdp_config.dtype=fp32"
CELLS: dict[str, list[str]] = {
    "plain": [FP32],
    "selective": ["model.enable_gradient_checkpointing=true", "model.gradient_checkpointing_policy=selective"],
    "checkpointing": ["model.enable_gradient_checkpointing=true"],
    "offload": ["model.fsdp_config.cpu_offload=true"],
    "sp": ["ulysses_sequence_parallel_size=2"],
    "modules": ["model.fsdp_config.wrap_policy.min_num_params=1000"],
    "bf16": ["model.fsdp_config.dtype=bf16"],
}
ON_SEVERAL = ("offload", "sp", "modules", "bf16")


class Training:
    """`held`: in 4 bits; else the base is `folder / dense`, a model of what those stand for."""

    def __init__(self, folder: Path, world: World, name: str, held: bool, keys: list[str]) -> None:
        self.base, self.world = folder / ("base" if held else "dense"), world
        keys = [*BASE, f"model.partial_pretrain={self.base}", *keys]
        keys += [f"model.lora_adapter_path={folder / 'base' / 'adapter'}", f"model.load_in_4bit={held}".lower()]
        keys += [f"trainer.default_local_dir={folder / f'{name}-{world.size}'}"]
        self.config = compose(keys).config
        sp = self.config.ulysses_sequence_parallel_size
        mesh = build_mesh(world, sp, -1)
        hf_config = load.read_config(self.base, False)
        torch.manual_seed(0)
        self.model, self.optimizer = assemble(self.config, self.base, hf_config, world, mesh)
        self.store = SampleStore(folder / "store")
        spec = replace(plan_spec(self.config.data, self.config.trainer.seed, mesh, hf_config), shuffle=False)
        self.loader = Loader(self.store, spec, mesh.dp_rank, sp)
        facts = {"processes": world.size, "data": "d", "config": recorded(self.config)}
        self.checkpoints = Checkpoints(self.config.trainer, 4, 4, facts, world.is_main, None)
        self.checkpoints.begin(None, self.model, self.optimizer)

    def steps(self, first: int, last: int) -> list[float]:
        batches = [self.loader.batch(step) for step in range(first, last)]
        results = [train_step(self.model, self.optimizer, batch, self.world, 1.0) for batch in batches]
        return [figure for result in results for figure in (result.loss, result.grad_norm)]

    def save(self, step: int) -> None:
        self.checkpoints.save(step, self.model, self.optimizer, False, False)
        self.checkpoints.wait_for_save()

    def gradients(self) -> dict[str, Tensor]:
        named = self.model.causal_lm.named_parameters()
        return {name: whole(p.grad).clone() for name, p in named if p.requires_grad}

    def gathered(self) -> str:
        """A hash of the codes and scales that the products of a validation meet."""
        found: dict[str, bytes] = {}

        def see(name: str, module: Any) -> None:
            found[name] = b"".join(part.detach().clone().numpy().tobytes() for part in (module.weight, module.absmax))

        modules = four_bit_modules(self.model.causal_lm)
        hooks = [m.register_forward_pre_hook(lambda m, _, name=n: see(name, m)) for n, m in modules]
        evaluate(self.model, self.loader, self.world)
        for hook in hooks:
            hook.remove()
        assert len(found) == len(modules) > 0
        return hashlib.sha256(b"".join(found[name] for name in sorted(found))).hexdigest()


def same_as_dense(folder: Path, world: World, cell: str) -> dict[str, Any]:
    """The largest relative differences, to the same training over weights that are what the 4 bits stand for."""
    runs = [Training(folder, world, f"{cell}-{held}", held, CELLS[cell]) for held in (True, False)]
    figures = [run.steps(0, 1) for run in runs]
    ours, expected = (run.gradients() for run in runs)
    norm = max(float(grad.norm()) for grad in expected.values())
    if world.is_main:
        save_file(ours, folder / f"{cell}-{world.size}.safetensors")
    more = [run.steps(1, 3) for run in runs]
    return {
        "figures": max(abs(a - b) / abs(b) for a, b in zip(*figures, strict=True)),
        "later": max(abs(a - b) / abs(b) for a, b in zip(*more, strict=True)),
        "gradients": max(float((ours[name] - grad).norm()) for name, grad in expected.items()) / norm,
        "loss": figures[0][0],
        "hash": runs[0].gathered(),
        "tensors": len(ours),
    }


def resumed(folder: Path, world: World) -> dict[str, Any]:
    """Two steps, a checkpoint, two more; and the same two by a run that begins there. Then it is handed over."""
    run, other = (Training(folder, world, "resume", True, [FP32]) for _ in range(2))
    run.steps(0, 2)
    run.save(2)
    expected = run.steps(2, 4)
    other.checkpoints.begin(folder_of(run.checkpoints.folder, 2), other.model, other.optimizer)
    found = other.steps(2, 4)
    run.save(4)
    hashes = [run.gathered(), other.gathered()]
    hand_over(other, folder / f"handed-over-{world.size}")
    return {"expected": expected, "found": found, "hashes": hashes}


def hand_over(run: Training, out: Path) -> None:
    """As the end of a run does, with its check."""
    probe = probe_of(run.store)
    live = live_loss(run.model, probe, run.world)
    merge(run.model.causal_lm, cast)
    assert not four_bit_modules(run.model)
    computed = torch.bfloat16 if run.config.model.fsdp_config.dtype == "bf16" else torch.float32
    check = lambda written: check_merged(written, probe, live, computed, False)  # noqa: E731
    save_model(run.model.causal_lm, open_base(run.base), out, options(), run.world.is_main, check)


def main(out: Path, folder: Path) -> None:
    world = launch.start("cpu", needs_group=False)
    cells = [cell for cell in CELLS if world.size > 1 or cell not in ON_SEVERAL]
    found: dict[str, Any] = {}
    for cell in cells:
        found[cell] = same_as_dense(folder, world, cell)
        gc.collect()
    found["resume"] = resumed(folder, world)
    if world.size > 1:
        hand_over(Training(folder, world, "half", True, CELLS["bf16"]), folder / "half")
    if world.is_main:
        out.write_text(json.dumps(found))
    gc.collect()
    if world.size > 1:
        launch.stop()
    os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))

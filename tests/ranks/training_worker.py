"""One process of `test_training_ranks`: filled weights, clipped steps, mixed precision, validation. Rank 0 writes."""

import gc
import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from safetensors.torch import save_file
from torch import nn

from apollo_sft.config.compose import compose
from apollo_sft.config.schema import SftConfig
from apollo_sft.data.batch.loader import Loader
from apollo_sft.data.store.store_files import SampleStore
from apollo_sft.model import attention, load
from apollo_sft.model.sft_model import SftModel
from apollo_sft.parallel import launch
from apollo_sft.parallel.launch import World
from apollo_sft.parallel.mesh import Mesh, build_mesh
from apollo_sft.train.assemble import assemble
from apollo_sft.train.loaders import plan_spec
from apollo_sft.train.step import train_step
from apollo_sft.train.validation import evaluate
from tests.support.oracle import oracle_loss, whole

BATCH, STEPS = 8, 3


def config_of(base: Path, *more: str) -> SftConfig:
    keys = [f"model.partial_pretrain={base}", "data.train_files=none", "data.val_files=null"]
    return compose([*keys, f"data.train_batch_size={BATCH}", "data.micro_batch_size_per_gpu=2", *more]).config


def assembled(base: Path, world: World, mesh: Mesh, *more: str) -> tuple[SftModel, torch.optim.Optimizer]:
    return assemble(config_of(base, *more), base, load.read_config(base, False), world, mesh)


def strays(model: nn.Module) -> list[str]:
    """Tensors that were left on the meta device, registered or not."""
    named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for module_name, module in model.named_modules():
        named |= {f"{module_name}.{n}": value for n, value in vars(module).items() if isinstance(value, torch.Tensor)}
    return [name for name, tensor in named.items() if tensor.is_meta]


def filled(base: Path, world: World, mesh: Mesh) -> dict[str, Any]:
    """What differs by a bit from the model that plain loading gives."""
    model, _ = assembled(base, world, mesh)
    source = SftModel(load.load_with_weights(base, load.read_config(base, False), torch.float32, False))
    expected = dict(source.named_parameters()) | dict(source.named_buffers())
    found = {name: whole(value.detach()) for name, value in model.named_parameters()} | dict(model.named_buffers())
    causal_lm = model.causal_lm
    return {
        "names": sorted(found) == sorted(expected),
        "buffers": len(dict(model.named_buffers())),
        "differ": [name for name in found if not torch.equal(found[name], expected[name])],
        "dtypes": sorted({str(value.dtype) for value in found.values()}),
        "tied": causal_lm.get_output_embeddings().weight is causal_lm.get_input_embeddings().weight,
        "meta": strays(model),
    }


def steps(base: Path, world: World, mesh: Mesh, store: SampleStore, *more: str) -> dict[str, Any]:
    """Losses and norms of a few steps at one rate, and the weights that they give."""
    config = config_of(base, *more)
    model, optimizer = assembled(base, world, mesh, *more)
    before = {name: whole(value.detach()).clone() for name, value in model.causal_lm.named_parameters()}
    spec = replace(plan_spec(config.data, config.trainer.seed, mesh, load.read_config(base, False)), shuffle=False)
    loader = Loader(store, spec, mesh.dp_rank)
    results = [train_step(model, optimizer, loader.batch(n), world, config.optim.clip_grad) for n in range(STEPS)]
    after = {name: whole(value.detach()) for name, value in model.causal_lm.named_parameters()}
    moved = sum(int((after[name] != value).sum()) for name, value in before.items())
    state = [value for moments in optimizer.state.values() for value in moments.values()]
    return {
        "losses": [result.loss for result in results],
        "norms": [result.grad_norm for result in results],
        "moved": moved / sum(value.numel() for value in before.values()),
        "dtypes": sorted({str(value.dtype) for value in [*model.parameters(), *state] if value.dim()}),
        "weights": {name: value.contiguous() for name, value in after.items()},
    }


def evaluations(base: Path, world: World, mesh: Mesh, folder: Path) -> list[list[Any]]:
    """(rows, micro-batch, loss, targets, expected loss, expected targets) of every store in the folder."""
    model, _ = assembled(base, world, mesh, "model.fsdp_config.model_dtype=fp64")
    hf_config = load.read_config(base, False)
    plain = load.load_with_weights(base, hf_config, torch.float64, False).eval()
    found = []
    for rows in range(1, 10):
        store = SampleStore(folder / f"rows{rows}")
        attention.register(attention.sdpa_kernel)
        with torch.no_grad():
            total, targets = oracle_loss(plain, [store[i] for i in range(rows)])
        for size in range(1, 5):
            config = config_of(base, f"data.micro_batch_size_per_gpu={size}")
            spec = plan_spec(config.data, config.trainer.seed, mesh, hf_config)
            spec = replace(spec, batch_size=size * mesh.dp_size, shuffle=False)
            loss, counted, _ = evaluate(model, Loader(store, spec, mesh.dp_rank), world)
            found.append([rows, size, loss, counted, float(total) / targets, targets])
    return found


def main(out: Path, folder: Path) -> None:
    """One process has a group of its own, as mixed precision needs."""
    world = launch.start("cpu", needs_group=True)
    mesh = build_mesh(world, 1)
    store = SampleStore(folder / "store")
    found: dict[str, Any] = {name: filled(folder / name, world, mesh) for name in ("tied", "untied")}
    clipped = steps(
        folder / "untied",
        world,
        mesh,
        store,
        "model.fsdp_config.model_dtype=fp64",
        "optim.clip_grad=0.1",
        "optim.lr=1e-2",
    )
    if world.is_main:
        save_file(clipped.pop("weights"), out.with_name(f"clipped-{world.size}.safetensors"))
    found["clipped"] = clipped
    for name, dtype in (("mixed", "bf16"), ("fp32", "fp32")):
        found[name] = steps(folder / "untied", world, mesh, store, f"model.fsdp_config.dtype={dtype}", "optim.lr=1e-6")
        del found[name]["weights"]
    found["evaluations"] = evaluations(folder / "untied", world, mesh, folder)
    if world.is_main:
        clipped.pop("weights", None)
        out.write_text(json.dumps(found))
    del mesh
    gc.collect()
    launch.stop()
    os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))

"""One process of `test_layouts`: every cell of the grid against the oracle, in fp64. Rank 0 writes the figures."""

import gc
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

from apollo_sft.config.compose import compose
from apollo_sft.data.loader import Loader
from apollo_sft.data.store_files import SampleStore
from apollo_sft.model import attention, load, lora
from apollo_sft.model.oracle import oracle
from apollo_sft.parallel import launch
from apollo_sft.parallel.launch import World
from apollo_sft.parallel.mesh import build_mesh
from apollo_sft.train.assemble import assemble
from apollo_sft.train.run import plan_spec
from apollo_sft.train.step import train_step


def cell(base: Path, store: SampleStore, overrides: list[str], world: World) -> tuple[float, float, dict[str, Any]]:
    """Loss, gradient norm and gradients of one step of the whole store under this layout."""
    fixed = [f"model.partial_pretrain={base}", "data.train_files=none", "data.val_files=null"]
    fixed += [f"data.train_batch_size={len(store)}", "model.fsdp_config.model_dtype=fp64"]
    config = compose([*fixed, *overrides]).config
    mesh = build_mesh(world, config.ulysses_sequence_parallel_size, config.model.fsdp_config.fsdp_size)
    hf_config = load.read_config(base, False)
    model, optimizer = assemble(config, base, hf_config, world, mesh)
    loader = Loader(store, plan_spec(config, mesh, hf_config), mesh.dp_rank, mesh.sp_size)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    result = train_step(model, optimizer, loader.batch(0), world, None)
    gradients = {}
    for name, parameter in model.causal_lm.named_parameters():
        grad = parameter.grad
        if not parameter.requires_grad:
            assert grad is None
            continue
        gradients[name] = grad.full_tensor() if hasattr(grad, "full_tensor") else grad
    return result.loss, result.grad_norm, gradients


def worst_difference(gradients: dict[str, Any], expected: dict[str, torch.Tensor]) -> float:
    assert gradients.keys() == expected.keys()
    return max(float((gradients[n] - g).norm() / g.norm().clamp_min(1e-300)) for n, g in expected.items())


def main(out: Path, folder: Path, cells: dict[str, list[list[str]]]) -> None:
    """`cells`: name of a model folder -> the overrides of each of its cells."""
    world = launch.start("cpu", needs_group=False)
    store = SampleStore(folder / "store")
    figures = []
    for name, layouts in cells.items():
        attention.register(attention.sdpa_kernel)
        config = load.read_config(folder / name, False)
        whole = load.load_with_weights(folder / name, config, torch.float64, False)
        adapter = folder / name / "adapter"
        if adapter.exists():
            continued = f"model.lora_adapter_path={adapter}"
            layouts = [[*layout, continued] for layout in layouts]
            model_config = compose(["data.train_files=none", "data.val_files=null", continued]).config.model
            lora.inject(whole, lora.lora_config(model_config, name), torch.float64, str(adapter))
        loss, expected = oracle(whole, [store[i] for i in range(len(store))])
        norm = float(torch.stack([g.norm() for g in expected.values()]).norm())
        for overrides in layouts:
            found_loss, found_norm, gradients = cell(folder / name, store, overrides, world)
            worst = worst_difference(gradients, expected)
            loss_error, norm_error = abs(found_loss - loss) / loss, abs(found_norm - norm) / norm
            figures.append([name, overrides, worst, loss_error, norm_error])
            del gradients
            gc.collect()
    if world.is_main:
        out.write_text(json.dumps(figures))
    launch.stop()
    os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), json.loads(Path(sys.argv[3]).read_text()))

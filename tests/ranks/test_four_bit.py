"""LoRA over a base in 4 bits, on 1 and 2 ranks: the same as over the weights that those bits stand for."""

import gc
import hashlib
import importlib.util
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
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
from apollo_sft.parallel.launch import World
from apollo_sft.parallel.mesh import build_mesh
from apollo_sft.tools.export import export_checkpoint
from apollo_sft.tools.plan.memory import Pack, Ranks, step_memory
from apollo_sft.train.assemble import assemble
from apollo_sft.train.checkpoints import Checkpoints
from apollo_sft.train.loaders import plan_spec
from apollo_sft.train.merged import check_merged, live_loss, probe_of
from apollo_sft.train.step import train_step
from apollo_sft.train.validation import evaluate
from tests.support.exports import open_base, options, tiny_tokenizer
from tests.support.models import save_tiny_adapter, save_tiny_model, tiny_config, tiny_model
from tests.support.oracle import whole
from tests.support.peaks import peaks
from tests.support.ranks import run_on_ranks
from tests.support.samples import random_samples, write_store

ROOT = Path(__file__).resolve().parents[2]
SIZES = {"hidden_size": 64, "intermediate_size": 96}
"""Rows of down_proj are no multiple of a block."""
TARGETS = ["q_proj", "up_proj", "down_proj"]
needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="needs the extra: pip install 'apollo-sft[qlora]'"
)


def write_dense(base: Path, dense: Path) -> None:
    """The model of what bitsandbytes makes of the linear modules of `base`, by its own functions."""
    from bitsandbytes import functional
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        for module in model.model.modules():
            if isinstance(module, torch.nn.Linear) and module.in_features % 64 == 0:
                codes, state = functional.quantize_4bit(module.weight, blocksize=64, quant_type="nf4")
                module.weight.copy_(functional.dequantize_4bit(codes, state))
    model.save_pretrained(dense)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("four_bits")
    model = tiny_model(tiny_config("Qwen2", tie_word_embeddings=False, **SIZES), torch.bfloat16)
    model.float().save_pretrained(folder / "base")  # the same weights in either dtype
    tiny_tokenizer().save_pretrained(folder / "base")
    save_tiny_adapter(folder / "base", target_modules=TARGETS)
    write_dense(folder / "base", folder / "dense")
    write_store(folder / "store", random_samples(48))
    return folder


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


def compare(world: World, folder: Path) -> dict[str, Any]:
    """On every rank: LoRA over a base in 4 bits, and over weights that are what it stands for."""
    cells = [cell for cell in CELLS if world.size > 1 or cell not in ON_SEVERAL]
    found: dict[str, Any] = {}
    for cell in cells:
        found[cell] = same_as_dense(folder, world, cell)
        gc.collect()
    found["resume"] = resumed(folder, world)
    if world.size > 1:
        hand_over(Training(folder, world, "half", True, CELLS["bf16"]), folder / "half")
    return found


@pytest.fixture(scope="module")
def found(folder: Path) -> dict[int, dict[str, Any]]:
    return {size: run_on_ranks(compare, size, folder, seconds=550)[0] for size in (1, 2)}


@needs_bitsandbytes
def test_it_trains_as_over_the_weights_that_the_bits_stand_for(found: dict[int, dict[str, Any]]) -> None:
    for size, cells in found.items():
        for cell, figures in cells.items():
            if cell != "resume":
                print(size, cell, figures)
                assert max(figures["figures"], figures["gradients"], figures["later"]) <= 1e-6, (size, cell)
                assert figures["tensors"] == 2 * 2 * len(TARGETS)
    assert set(found[2]) > set(found[1])


@needs_bitsandbytes
def test_ranks_gather_the_bits_that_one_process_has(found: dict[int, dict[str, Any]]) -> None:
    hashes = {figures["hash"] for cells in found.values() for cell, figures in cells.items() if cell != "resume"}
    assert len(hashes) == 1


@needs_bitsandbytes
def test_gradients_do_not_depend_on_the_ranks(found: dict[int, dict[str, Any]], folder: Path) -> None:
    expected = load_file(folder / "plain-1.safetensors")
    for cell in ("plain", "selective", "checkpointing", "offload", "sp", "modules"):
        assert found[2][cell]["loss"] == pytest.approx(found[1]["plain"]["loss"], rel=1e-6)
        gradients = load_file(folder / f"{cell}-2.safetensors")
        assert gradients.keys() == expected.keys()
        for name, grad in expected.items():
            torch.testing.assert_close(gradients[name], grad, rtol=1e-4, atol=1e-5)


@needs_bitsandbytes
@pytest.mark.parametrize("size", [1, 2])
def test_a_run_goes_on_over_the_same_bits(found: dict[int, dict[str, Any]], size: int) -> None:
    resumed = found[size]["resume"]
    assert resumed["found"] == resumed["expected"]
    assert len({found[1]["plain"]["hash"], *resumed["hashes"]}) == 1


@needs_bitsandbytes
@pytest.mark.parametrize("size", [1, 2])
def test_what_is_handed_over_is_what_was_trained(found: dict[int, dict[str, Any]], folder: Path, size: int) -> None:
    """Its loss was compared by the worker, as at the end of a run, before it was visible."""
    assert "resume" in found[size]
    base, dense = (load_file(folder / name / "model.safetensors") for name in ("base", "dense"))
    handed_over = load_file(folder / f"handed-over-{size}" / "model.safetensors")
    assert {n: (t.shape, t.dtype) for n, t in handed_over.items()} == {n: (t.shape, t.dtype) for n, t in base.items()}
    for name, tensor in handed_over.items():
        if any(target in name and "weight" in name for target in TARGETS):
            assert not torch.equal(tensor, dense[name]), name
        else:
            assert torch.equal(tensor, dense[name]), name
    frozen = "model.layers.0.self_attn.o_proj.weight"
    assert not torch.equal(base[frozen], dense[frozen])
    out = folder / f"exported-{size}"
    export_checkpoint(folder / f"resume-{size}" / "checkpoints" / "step_000004", out)
    from_checkpoint = load_file(out / "model.safetensors")
    for name, tensor in handed_over.items():
        torch.testing.assert_close(from_checkpoint[name], tensor, rtol=1e-6, atol=1e-6)
        assert "proj" in name or torch.equal(from_checkpoint[name], tensor)


@needs_bitsandbytes
def test_a_base_in_half_precision_is_handed_over_too(found: dict[int, dict[str, Any]], folder: Path) -> None:
    assert "bf16" in found[2]
    assert (folder / "half" / "config.json").is_file()


@needs_bitsandbytes
def test_a_plan_counts_what_a_step_holds(tmp_path: Path) -> None:
    """By torch's own tracker, as in tests/parity/test_plan.py; weights are most of it here."""
    hf_config = tiny_config("Llama", hidden_size=512, intermediate_size=1024, num_hidden_layers=3)
    save_tiny_model(tmp_path / "base", hf_config)
    store = write_store(tmp_path / "store", random_samples(2, most_targets=10))
    samples = [store[i] for i in range(2)]
    keys = ["model.lora_rank=4", "model.load_in_4bit=true"]
    (measured,) = run_on_ranks(peaks, 2, tmp_path, [["base", *keys]])[0]
    pack = Pack(tuple(len(sample.labels) for sample in samples), sum(sample.num_targets for sample in samples))
    base = ["data.train_files=none", "data.val_files=null", f"model.partial_pretrain={tmp_path / 'base'}"]
    four, all_bits = (
        step_memory(compose([*base, *more]).config, hf_config, Ranks(2, on_cuda=False), pack, 2).total
        for more in (keys, keys[:1])
    )
    print(f"planned {four:,}, measured {measured:,}, with weights in 32 bits {all_bits:,}")
    assert four == pytest.approx(measured, rel=0.02)
    assert four < 0.5 * all_bits


@pytest.mark.long
@pytest.mark.timeout(3000)
@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is not None, reason="the tests above run")
def test_with_bitsandbytes_in_a_folder_of_its_own(tmp_path: Path) -> None:
    """Installed for this test alone: nothing else needs it."""
    target = tmp_path / "packages"
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(target), "bitsandbytes>=0.46"]
    subprocess.run(install, check=True, timeout=600)
    files = [str(Path(__file__)), str(ROOT / "tests" / "unit" / "model" / "test_four_bit.py")]
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-rs", "-m", "not long", *files]
    finished = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(target)}, capture_output=True, text=True, check=False
    )
    assert finished.returncode == 0, finished.stdout[-6000:]
    assert "skipped" not in finished.stdout, finished.stdout[-6000:]

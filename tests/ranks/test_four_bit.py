"""LoRA over a base in 4 bits, on 1 and 2 ranks: the same as over the weights that those bits stand for."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from apollo_sft.config.compose import compose
from apollo_sft.tools.export import export_checkpoint
from apollo_sft.tools.plan.memory import Pack, Ranks, step_memory
from tests.support.exports import tiny_tokenizer
from tests.support.models import save_tiny_adapter, save_tiny_model, tiny_config, tiny_model
from tests.support.ranks import run_ranks
from tests.support.samples import random_samples, write_store

WORKER = Path(__file__).with_name("four_bit_worker.py")
PLAN_WORKER = WORKER.parents[1] / "parity" / "plan_worker.py"
ROOT = WORKER.parents[2]
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


@pytest.fixture(scope="module")
def found(folder: Path) -> dict[int, dict[str, Any]]:
    return {size: run_ranks(WORKER, size, folder, str(folder), seconds=550) for size in (1, 2)}


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
    (measured,) = run_ranks(PLAN_WORKER, 2, tmp_path, str(tmp_path), json.dumps([["base", *keys]]))
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

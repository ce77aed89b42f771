"""What sharded ranks hold, and what their steps and validations give, against one process written out."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from apollo_sft.config.compose import compose
from apollo_sft.config.schema import SftConfig
from apollo_sft.data.batch.loader import Loader
from apollo_sft.data.store.store_files import SampleStore
from apollo_sft.model import attention, load
from apollo_sft.model.sft_model import SftModel
from apollo_sft.parallel.launch import World
from apollo_sft.parallel.mesh import Mesh, build_mesh
from apollo_sft.train.assemble import assemble
from apollo_sft.train.loaders import plan_spec
from apollo_sft.train.step import train_step
from apollo_sft.train.validation import evaluate
from apollo_sft.types import Sample
from tests.support.models import save_tiny_model, tiny_config
from tests.support.oracle import oracle_gradients, oracle_loss, total_norm, whole, worst_difference
from tests.support.ranks import run_on_ranks
from tests.support.samples import random_samples, write_store

BATCH, STEPS, RATE, CLIP = 8, 3, 1e-2, 0.1
BETAS, EPS, DECAY = (0.9, 0.95), 1e-8, 0.01


def samples() -> list[Sample]:
    return random_samples(BATCH * STEPS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    save_tiny_model(folder / "untied", tiny_config("Qwen2"))
    save_tiny_model(folder / "tied", tiny_config("Qwen3", tie_word_embeddings=True, head_dim=8))
    write_store(folder / "store", samples())
    for rows in range(1, 10):
        write_store(folder / f"rows{rows}", random_samples(rows + 1)[1:])
    return folder


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


def measure(world: World, folder: Path) -> dict[str, Any]:
    """On every rank: filled weights, clipped steps, mixed precision, validation."""
    mesh = build_mesh(world, 1)
    store = SampleStore(folder / "store")
    found: dict[str, Any] = {name: filled(folder / name, world, mesh) for name in ("tied", "untied")}
    keys = ["model.fsdp_config.model_dtype=fp64", f"optim.clip_grad={CLIP}", f"optim.lr={RATE}"]
    found["clipped"] = steps(folder / "untied", world, mesh, store, *keys)
    found["weights"] = found["clipped"].pop("weights")
    for name, dtype in (("mixed", "bf16"), ("fp32", "fp32")):
        found[name] = steps(folder / "untied", world, mesh, store, f"model.fsdp_config.dtype={dtype}", "optim.lr=1e-6")
        del found[name]["weights"]
    found["evaluations"] = evaluations(folder / "untied", world, mesh, folder)
    return found


@pytest.fixture(scope="module", params=[1, 2, pytest.param(4, marks=pytest.mark.long)])
def found(request: pytest.FixtureRequest, folder: Path) -> dict[str, Any]:
    outcome: dict[str, Any] = run_on_ranks(measure, request.param, folder, needs_group=True)[0]
    return outcome


def adamw(weight: Tensor, gradient: Tensor, moments: list[Tensor], step: int) -> None:
    """Source: arXiv:1711.05101, algorithm 2, with the decay on matrices only."""
    for moment, beta, value in zip(moments, BETAS, (gradient, gradient**2), strict=True):
        moment.mul_(beta).add_((1 - beta) * value)
    mean, square = (moment / (1 - beta**step) for moment, beta in zip(moments, BETAS, strict=True))
    weight.mul_(1 - RATE * DECAY * (weight.dim() >= 2)).sub_(RATE * mean / (square.sqrt() + EPS))


@pytest.fixture(scope="module")
def written_out(folder: Path) -> tuple[dict[str, Tensor], list[float], list[float]]:
    """Weights after three clipped steps of one process, the losses, and the norms before clipping."""
    attention.register(attention.sdpa_kernel)
    base = folder / "untied"
    model = load.load_with_weights(base, load.read_config(base, False), torch.float64, False)
    moments = {name: [torch.zeros_like(p), torch.zeros_like(p)] for name, p in model.named_parameters()}
    losses, norms = [], []
    for step in range(STEPS):
        loss, gradients = oracle_gradients(model, samples()[step * BATCH : (step + 1) * BATCH])
        losses.append(loss)
        norms.append(total_norm(gradients))
        with torch.no_grad():
            for name, weight in model.named_parameters():
                shortened = gradients[name] * min(1.0, CLIP / (norms[-1] + 1e-6))
                adamw(weight, shortened, moments[name], step + 1)
    return {name: p.detach() for name, p in model.named_parameters()}, losses, norms


@pytest.mark.parametrize("name", ["tied", "untied"])
def test_the_shards_hold_the_source_bit_for_bit(found: dict[str, Any], name: str) -> None:
    filled = found[name]
    assert filled["names"]
    assert filled["buffers"] > 0
    assert filled["differ"] == filled["meta"] == []
    assert filled["dtypes"] == ["torch.float32"]
    assert filled["tied"] == (name == "tied")


def test_clipped_steps_give_the_weights_of_one_process(
    found: dict[str, Any], written_out: tuple[dict[str, Tensor], list[float], list[float]]
) -> None:
    weights, losses, norms = written_out
    assert min(norms) > 1.5 * CLIP, "every step must be clipped"
    assert found["clipped"]["losses"] == pytest.approx(losses, rel=1e-12)
    assert found["clipped"]["norms"] == pytest.approx(norms, rel=1e-12)
    worst = worst_difference(found["weights"], weights)
    print(f"\nweights after {STEPS} clipped steps: worst {worst:.1e}")
    assert worst <= 1e-12


def test_bf16_computes_and_fp32_remembers(found: dict[str, Any]) -> None:
    mixed, exact = found["mixed"], found["fp32"]
    assert mixed["dtypes"] == exact["dtypes"] == ["torch.float32"]
    assert mixed["losses"] == pytest.approx(exact["losses"], rel=5e-3)
    assert mixed["losses"] != pytest.approx(exact["losses"], rel=1e-6), "bf16 must have been used"
    assert mixed["moved"] > 0.99 * exact["moved"], "small updates are not lost"


def test_validation_is_the_token_mean_of_all_rows(found: dict[str, Any]) -> None:
    assert len(found["evaluations"]) == 36
    worst = 0.0
    for rows, size, loss, counted, expected, targets in found["evaluations"]:
        assert counted == targets, (rows, size)
        worst = max(worst, abs(loss - expected) / expected)
    print(f"\nvalidation: worst {worst:.1e}")
    assert worst <= 1e-12

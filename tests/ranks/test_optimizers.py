"""muon and adamw_8bit make the same steps on any number of ranks, save what they need, and go on with it."""

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from apollo_sft.checkpoint.run_folder.resume import folder_of
from apollo_sft.parallel.launch import World
from tests.support.models import save_tiny_adapter, save_tiny_model, tiny_config
from tests.support.oracle import whole, worst_difference
from tests.support.ranks import run_on_ranks
from tests.support.samples import random_samples, write_store
from tests.support.strategies import DOUBLE, STEPS, Training

EXACT = 1e-12
SAVED = 1
"""The step after which there is a checkpoint."""

OPTIMIZERS = ("muon", "adamw_8bit")
LORA = [f"{optimizer} lora" for optimizer in OPTIMIZERS]
TIED = [f"{optimizer} tied" for optimizer in OPTIMIZERS]
Found = tuple[Path, int, dict[int, dict[str, Any]]]


LONG = [pytest.param((2, LORA), marks=pytest.mark.long), pytest.param((4, TIED + LORA), marks=pytest.mark.long)]


OFFLOAD = "model.fsdp_config.cpu_offload=true"


def cell(folder: Path, model: str, optimizer: str, world: World) -> dict[str, Any]:
    """All steps in one piece, with a checkpoint in the middle; then on from there, and from that of two ranks."""
    keys = [DOUBLE, f"optim.name={optimizer}"]
    one = Training(folder, model, "fsdp2", world, *keys)
    one.checkpoints.saver.folder = folder / f"{model}-{optimizer}-{world.size}" / "checkpoints"
    first = one.steps(0, SAVED)
    one.save(SAVED)
    figures = first + one.steps(SAVED, STEPS)
    again = Training(folder, model, "fsdp2", world, *keys)
    again.checkpoints.saver.folder = one.checkpoints.folder
    again.go_on(SAVED)
    rest = again.steps(SAVED, STEPS)
    weights, state = one.weights(), one.state()
    found = {
        "figures": figures,
        "resumed": rest == figures[len(first) :],
        "same": all(torch.equal(weights[name], weight) for name, weight in again.weights().items()),
        "state": {name.rpartition("/")[2]: str(value.dtype) for name, value in state.items()},
        "moments": sorted(name for name in state if name.startswith("optim/")),
    }
    if world.is_main:
        save_file(
            {name: w.contiguous() for name, w in weights.items()}, folder / f"{model}-{optimizer}-{world.size}.st"
        )
    elsewhere = folder / f"{model}-{optimizer}-2" / "checkpoints"
    if world.size == 1 and elsewhere.is_dir():
        there = Training(folder, model, "fsdp2", world, *keys)
        there.checkpoints.begin(folder_of(elsewhere, SAVED), there.model, there.optimizer)
        found["from two ranks"] = there.steps(SAVED, STEPS)
    return found


def cells_of(world: World, folder: Path, cells: list[str]) -> dict[str, Any]:
    """On every rank: steps by muon and adamw_8bit in fp64, and by muon with its state on the host."""
    found: dict[str, Any] = {}
    for name in cells:
        optimizer, model = name.split()
        found[name] = cell(folder, model, optimizer, world)
        gc.collect()
    plain = Training(folder, "tied", "fsdp2", world, DOUBLE, "optim.name=muon")
    moved = Training(folder, "tied", "fsdp2", world, DOUBLE, "optim.name=muon", OFFLOAD)
    figures = [plain.steps(0, 2), moved.steps(0, 2)]
    pairs = zip(plain.model.parameters(), moved.model.parameters(), strict=True)
    found["offload"] = [figures[0] == figures[1], all(torch.equal(whole(a), whole(b)) for a, b in pairs)]
    return found


@pytest.fixture(scope="module", params=[(2, TIED), *LONG], ids=["2", "2, lora", "4"])
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Found:
    """Cells on so many ranks (of four, two share a copy), then in this process."""
    size, cells = request.param
    folder = tmp_path_factory.mktemp("optimizers")
    sizes = {"hidden_size": 40, "intermediate_size": 300, "num_attention_heads": 5, "num_key_value_heads": 1}
    save_tiny_model(folder / "tied", tiny_config("Qwen3", tie_word_embeddings=True, head_dim=8, **sizes))
    save_tiny_model(folder / "lora", tiny_config("Llama", **sizes))
    save_tiny_adapter(folder / "lora", target_modules=["q_proj", "down_proj", "embed_tokens"])
    write_store(folder / "store", random_samples(48))
    several = run_on_ranks(cells_of, size, folder, cells)[0]
    here = World(0, 1, 0, torch.device("cpu"))
    return folder, size, {size: several, 1: {name: cell(folder, *reversed(name.split()), here) for name in cells}}


def test_the_same_steps_on_any_number_of_ranks(found: Found) -> None:
    folder, size, outcomes = found
    for name in outcomes[1]:
        optimizer, model = name.split()
        one, several = (outcomes[ranks][name]["figures"] for ranks in (1, size))
        losses = max(abs(a - b) / a for a, b in zip(one, several, strict=True))
        weights = [load_file(folder / f"{model}-{optimizer}-{ranks}.st") for ranks in (size, 1)]
        apart = worst_difference(*weights)
        print(f"\n{name}, {size} ranks: losses and norms apart {losses:.1e}, weights {apart:.1e}")
        assert losses <= EXACT
        assert apart <= EXACT


def test_a_run_goes_on_bit_for_bit(found: Found) -> None:
    _, size, outcomes = found
    for name, one in outcomes[1].items():
        for ranks in (1, size):
            assert outcomes[ranks][name]["resumed"]
            assert outcomes[ranks][name]["same"]
        rest = one["figures"][2 * SAVED :]
        assert size != 2 or one["from two ranks"] == pytest.approx(rest, rel=EXACT)


def test_what_is_kept(found: Found) -> None:
    _, _, outcomes = found
    if "muon tied" not in outcomes[1]:
        return
    muon, small = (outcomes[1][f"{name} tied"] for name in OPTIMIZERS)
    layer = "optim/causal_lm.model.layers.0."
    assert [name for name in muon["moments"] if name.startswith(f"{layer}mlp.up_proj")] == [
        f"{layer}mlp.up_proj.weight/momentum_buffer"
    ]
    for name in ("embed_tokens", "layers.0.input_layernorm"):
        kept = [moment for moment in muon["moments"] if f".{name}.weight/" in moment]
        assert [moment.rpartition("/")[2] for moment in kept] == ["exp_avg", "exp_avg_sq"]
    assert small["state"]["exp_avg_scale"] == str(torch.float32)
    assert f"{layer}input_layernorm.weight/exp_avg_scale" not in small["moments"]


def test_offload_changes_nothing(found: Found) -> None:
    _, size, outcomes = found
    assert outcomes[size]["offload"] == [True, True]

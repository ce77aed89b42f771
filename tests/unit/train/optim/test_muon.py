"""Muon on whole matrices is torch's own; which weights it takes."""

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from apollo_sft.checkpoint.run_folder.resume import check_same
from apollo_sft.checkpoint.run_folder.state import read_state, snapshot, write_state
from apollo_sft.config.compose import compose
from apollo_sft.errors import CheckpointError, ConfigError
from apollo_sft.tools.plan.memory import STATE, Pack, Ranks, step_memory
from apollo_sft.train.optim.build import build_optimizer, check_optimizer, fill_state, state_bytes
from apollo_sft.train.optim.muon import CombinedOptimizer, Muon
from tests.support.models import tiny_config, tiny_model


def optim_config(*overrides: str):
    return compose(["data.train_files=x", "data.val_files=null", *overrides]).config.optim


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (1, 8)])
def test_it_is_torchs_update(shape: tuple[int, int]) -> None:
    ours, theirs = (nn.Parameter(torch.ones(shape)) for _ in range(2))
    optimizers = [
        Muon([{"params": [ours], "weight_decay": 0.3}], lr=0.02),
        torch.optim.Muon([theirs], lr=0.02, weight_decay=0.3, adjust_lr_fn="match_rms_adamw"),
    ]
    generator = torch.Generator().manual_seed(0)
    for step in range(4):
        gradient = torch.randn(shape, generator=generator)
        for parameter, optimizer in zip((ours, theirs), optimizers, strict=True):
            optimizer.param_groups[0]["lr"] = 0.02 / (step + 1)
            parameter.grad = gradient.clone()
            optimizer.step()
        assert torch.equal(ours, theirs)
    assert not torch.equal(ours, torch.ones(shape))


@pytest.mark.parametrize("tied", [False, True])
def test_matrices_of_layers_and_the_rest(tied: bool) -> None:
    model = tiny_model(tiny_config("Qwen2", tie_word_embeddings=tied))
    optimizer = build_optimizer(model, optim_config("optim.name=muon", "optim.weight_decay=0.3"))
    by_muon = {id(p): g["weight_decay"] for g in optimizer.param_groups if "momentum" in g for p in g["params"]}
    for name, parameter in model.named_parameters():
        inside = "layers" in name and parameter.dim() == 2
        assert (id(parameter) in by_muon) == inside, name
    assert set(by_muon.values()) == {0.3}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(model.parameters()))


def test_experts_in_one_tensor_are_left_to_adamw() -> None:
    config = tiny_config("Qwen3Moe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, head_dim=8)
    model = tiny_model(config)
    groups = build_optimizer(model, optim_config("optim.name=muon")).param_groups
    experts = [p for p in model.parameters() if p.dim() == 3]
    by_adamw = {id(p) for group in groups if "betas" in group for p in group["params"]}
    assert experts
    assert all(id(p) in by_adamw for p in experts)


def test_two_optimizers_are_one() -> None:
    matrix, vector = nn.Parameter(torch.ones(4, 4)), nn.Parameter(torch.ones(4))
    both = CombinedOptimizer([Muon([{"params": [matrix]}], lr=0.1), torch.optim.AdamW([vector], lr=0.1)])
    for group in both.param_groups:
        group["lr"] = 0.0
    for parameter in (matrix, vector):
        parameter.grad = torch.ones_like(parameter)
    both.step()
    assert torch.equal(matrix, torch.ones(4, 4)), "the rate is set through the groups of both"
    assert set(both.state[matrix]) == {"momentum_buffer"}
    assert set(both.state[vector]) == {"step", "exp_avg", "exp_avg_sq"}
    both.zero_grad()
    assert matrix.grad is None
    assert vector.grad is None


@pytest.mark.parametrize("name", ["adamw", "muon", "adamw_8bit"])
def test_bytes_are_known_before_there_is_a_state(name: str) -> None:
    model = tiny_model(tiny_config("Qwen2", hidden_size=64, vocab_size=300), torch.float32)
    config = optim_config(f"optim.name={name}")
    foretold = state_bytes(build_optimizer(model.to("meta"), config))
    model = tiny_model(tiny_config("Qwen2", hidden_size=64, vocab_size=300), torch.float32)
    filled, stepped = build_optimizer(model, config), build_optimizer(model, config)
    fill_state(filled)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    stepped.step()
    for optimizer in (filled, stepped):
        tensors = [t for state in optimizer.state.values() for n, t in state.items() if n != "step"]
        assert sum(tensor.nbytes for tensor in tensors) == foretold
    for parameter, state in stepped.state.items():
        assert {n: (t.shape, t.dtype) for n, t in state.items()} == {
            n: (t.shape, t.dtype) for n, t in filled.state[parameter].items()
        }


@pytest.mark.parametrize("name", ["muon", "adamw_8bit"])
def test_flat_shards_are_refused(name: str) -> None:
    check_optimizer(optim_config(f"optim.name={name}"), "fsdp2")
    check_optimizer(optim_config(), "fsdp")
    with pytest.raises(ConfigError, match=f"optim.name={name} needs matrices"):
        check_optimizer(optim_config(f"optim.name={name}"), "fsdp")


@pytest.mark.parametrize("name", ["muon", "adamw_8bit"])
def test_plan_counts_the_state(name: str) -> None:
    hf_config = tiny_config("Qwen2", num_hidden_layers=5)
    config = compose(["data.train_files=x", "data.val_files=null", f"optim.name={name}"]).config
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(hf_config, dtype=torch.float32)
    # One layer of the five runs, then two: what the others add is computed from these.
    planned = step_memory(config, hf_config, Ranks(1, False), Pack((30, 20), 40), 1, repeats=1)
    steps = 4 * len(list(model.parameters()))  # the number of steps of each weight
    assert state_bytes(build_optimizer(model, config.optim)) == pytest.approx(planned.parts[STATE], abs=steps)


@pytest.mark.parametrize(("before", "after"), [("adamw", "muon"), ("adamw", "adamw_8bit"), ("muon", "adamw")])
def test_a_run_does_not_go_on_under_another_optimizer(tmp_path: Path, before: str, after: str) -> None:
    configs = [{"optim": {"name": name}} for name in (before, after)]
    with pytest.raises(ConfigError, match=f"optim.name: {before} then, {after} now"):
        check_same(*configs, "trainer.default_local_dir=x", False, [])
    model = tiny_model(tiny_config("Qwen2"), torch.float32)
    first, second = (build_optimizer(model, optim_config(f"optim.name={name}")) for name in (before, after))
    for optimizer in (first, second):
        fill_state(optimizer)
    write_state(tmp_path, snapshot(model, first, ["model", "optimizer"], copy=False), {"step": 1}, True)
    read_state(tmp_path, model, first, 1, same_ranks=False)
    with pytest.raises(CheckpointError, match="does not hold this model's state"):
        read_state(tmp_path, model, second, 1, same_ranks=False)

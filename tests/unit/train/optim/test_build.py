"""The optimizer's groups."""

import torch
from torch import nn

from apollo_sft.config.compose import compose
from apollo_sft.train.optim.build import build_optimizer


def optim_config(*overrides: str):
    return compose(["data.train_files=x", "data.val_files=null", *overrides]).config.optim


def model() -> nn.Module:
    return nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4), nn.LayerNorm(4))


def test_decay_is_for_matrices_only() -> None:
    layers = model()
    optimizer = build_optimizer(layers, optim_config("optim.weight_decay=0.3", "optim.betas=[0.8,0.9]"))
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert {name: decay[id(p)] for name, p in layers.named_parameters()} == {
        "0.weight": 0.3,
        "1.weight": 0.3,
        "1.bias": 0.0,
        "2.weight": 0.0,
        "2.bias": 0.0,
    }
    assert all(group["betas"] == (0.8, 0.9) for group in optimizer.param_groups)


def test_what_is_frozen_has_no_state() -> None:
    layers = model()
    layers[0].weight.requires_grad_(False)
    optimizer = build_optimizer(layers, optim_config())
    assert all(p is not layers[0].weight for group in optimizer.param_groups for p in group["params"])
    layers[2].requires_grad_(False)
    layers[1].bias.requires_grad_(False)
    assert len(build_optimizer(layers, optim_config()).param_groups) == 1


def test_one_step_is_adamw() -> None:
    weight = nn.Parameter(torch.full((2, 2), 3.0, dtype=torch.float64))
    gain = nn.Parameter(torch.full((2,), 3.0, dtype=torch.float64))
    both = nn.ParameterList([weight, gain])
    optimizer = build_optimizer(both, optim_config("optim.lr=0.1", "optim.weight_decay=0.5"))
    for parameter in (weight, gain):
        parameter.grad = torch.full_like(parameter, 7.0)
    optimizer.step()
    torch.testing.assert_close(weight.detach(), torch.full_like(weight, 3.0 * (1 - 0.1 * 0.5) - 0.1), rtol=1e-8, atol=0)
    torch.testing.assert_close(gain.detach(), torch.full_like(gain, 3.0 - 0.1), rtol=1e-8, atol=0)

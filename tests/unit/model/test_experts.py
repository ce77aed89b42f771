"""LoRA on experts that are held in one tensor: PEFT's own adapters, computed beside the experts' products."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from apollo_sft.checkpoint.model_folder.rounding import cast
from apollo_sft.checkpoint.model_folder.write import save_adapter
from apollo_sft.config.compose import compose
from apollo_sft.config.schema import ModelConfig
from apollo_sft.errors import ConfigError
from apollo_sft.model import adapter_files, experts, lora
from apollo_sft.model.flops import cost_of
from apollo_sft.train.optim.build import build_optimizer
from tests.support.exports import adapter_folder
from tests.support.models import save_tiny_model, tiny_config, tiny_model

CHOSEN = {"num_experts_per_tok": 2}
FAMILIES: dict[str, dict[str, Any]] = {
    "Qwen3Moe": CHOSEN | {"num_experts": 4, "moe_intermediate_size": 24, "head_dim": 8},
    "Qwen2Moe": CHOSEN | {"num_experts": 4, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 24},
    "Mixtral": CHOSEN | {"num_local_experts": 4},
    "GptOss": CHOSEN | {"num_local_experts": 4, "head_dim": 8},
}
"""With PEFT's names and without; a shared expert; biases and weights that lie the other way round."""
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8}
DENSE_FIRST = CHOSEN | LATENT | {"n_routed_experts": 4, "moe_intermediate_size": 24, "first_k_dense_replace": 1}
TENSORS = {"gate_up_proj", "down_proj"}


def settings(*overrides: str) -> ModelConfig:
    return compose(["data.train_files=x", "data.val_files=null", "model.lora_rank=3", *overrides]).config.model


def adapted(model: Any, *overrides: str) -> lora.Adapted:
    """With adapters, all of whose numbers matter."""
    dtype = next(model.parameters()).dtype
    found = lora.inject(model, lora.lora_config(settings(*overrides), "b"), torch.promote_types(dtype, torch.float32))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return found


def logits(model: Any) -> torch.Tensor:
    return model.eval()(torch.arange(2, 40)[None]).logits


def logits_and_gradients(model: Any) -> dict[str, torch.Tensor]:
    model.zero_grad()
    found = logits(model)
    found.square().sum().backward()
    return {"logits": found.detach()} | {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_as_pefts_own_forward(family: str) -> None:
    config = tiny_config(family, **FAMILIES[family])
    config._experts_implementation = "eager"
    model = tiny_model(config)
    found = adapted(model)
    assert {name.rpartition(".")[2] for name in found.modules if ".experts." in name} == TENSORS
    assert found.left == ()
    (_, first), *_ = experts.wrapped(model)
    ranks = {w.parameter_name: (w.r["default"], w.scaling["default"]) for w in experts.wrappers(first)}
    assert ranks == {"gate_up_proj": (6, 16 / 3), "down_proj": (3, 16 / 3)}, "gate and up: rank of two, scaled alike"
    ours = logits_and_gradients(model)
    for _, outermost in experts.wrapped(model):
        del outermost.forward
    theirs = logits_and_gradients(model)
    assert any(".experts." in name for name in ours)
    for name, expected in theirs.items():
        assert float((ours[name] - expected).norm() / expected.norm()) < 1e-12, name


@pytest.mark.parametrize("family", FAMILIES)
def test_merged_and_read_by_peft_and_continued(tmp_path: Path, family: str) -> None:
    base = save_tiny_model(tmp_path / "base", tiny_config(family, **FAMILIES[family]))
    model = AutoModelForCausalLM.from_pretrained(base)
    names = set(model.state_dict())
    adapted(model)
    with torch.no_grad():
        live = logits(model)
        written = adapter_folder(base, adapter_files.saved_config(model))
        save_adapter(adapter_files.adapter_tensors(model), written, tmp_path, model, is_writer=True)
        lora.merge(model, cast)
        assert set(model.state_dict()) == names
        torch.testing.assert_close(logits(model), live, rtol=1e-5, atol=1e-5)
        reloaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter")
        torch.testing.assert_close(logits(reloaded), live, rtol=1e-5, atol=1e-5)
        again, path = AutoModelForCausalLM.from_pretrained(base), str(tmp_path / "adapter")
        continued = lora.lora_config(settings(f"model.lora_adapter_path={path}"), str(base))
        lora.inject(again, continued, torch.float32, path)
        torch.testing.assert_close(logits(again), live, rtol=1e-5, atol=1e-5)


def kept_for_the_backward(model: Any) -> int:
    """Bytes beside parameters."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        found = logits(model)
    assert found.requires_grad
    return sum(kept.values())


def test_nothing_of_the_size_of_the_experts_is_kept() -> None:
    """PEFT keeps the sum of weights and B A until the backward. Here a copy of B stays: much, in so small a model."""
    model = tiny_model(tiny_config("Qwen3Moe", **FAMILIES["Qwen3Moe"] | {"num_experts": 64}), torch.float32)
    adapted(model)
    ours = kept_for_the_backward(model)
    wrapped = experts.wrapped(model)
    for _, outermost in wrapped:
        del outermost.forward
    num_weights = sum(w.get_param().numel() for _, outermost in wrapped for w in experts.wrappers(outermost))
    assert kept_for_the_backward(model) - ours > 0.5 * 4 * num_weights


def test_linear_modules_that_peft_takes_for_experts_are_named() -> None:
    model = tiny_model(tiny_config("DeepseekV3", n_group=1, topk_group=1, **DENSE_FIRST), torch.float32)
    found = adapted(model)
    assert "model.layers.0.mlp.gate_proj" in found.left
    assert "asked for and not adapted" in str(found)
    assert "model.layers.1.mlp.experts.gate_up_proj" in found.modules


def test_named_tensors_alone() -> None:
    model = tiny_model(tiny_config("GptOss", **FAMILIES["GptOss"]), torch.float32)
    found = adapted(model, "model.target_modules=[q_proj]", "model.target_parameters=[experts.down_proj]")
    assert {name.rpartition(".")[2] for name in found.modules} == {"q_proj", "down_proj"}


REFUSED = {
    "model.lora_dropout": ["model.lora_dropout=0.1"],
    "model.use_dora": ["model.use_dora=true"],
    "not one of gated experts": ["model.target_modules=[gate]"],
    "target_modules cannot be adapted": ["model.target_modules=[]", "model.target_parameters=[no_such_tensor]"],
    "Cannot convert PEFT target": ["model.target_modules=[q_proj,up_proj]"],
    "unterminated": ["model.target_modules=(q_proj"],
    "adapted and not named": ["model.target_modules=.*layers.0..*(q|gate|up|down)_proj"],
    "named and not adapted": ["model.target_modules=[model.layers.0.mlp.gate_proj,up_proj,down_proj,q_proj]"],
    "name the same module": ["model.modules_to_save=[mlp.experts]"],
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_these_adapters_do_not_know_is_refused_by_name(what: str) -> None:
    dense_first = {"mlp_only_layers": [0]} if "named" in what else {}
    model = tiny_model(tiny_config("Qwen3Moe", **FAMILIES["Qwen3Moe"], **dense_first), torch.float32)
    with pytest.raises(ConfigError, match=what):
        adapted(model, *REFUSED[what])


def test_groups_by_size_are_refused() -> None:
    large = "model.fsdp_config.wrap_policy.min_num_params=100"
    model = tiny_model(tiny_config("Qwen3Moe", **FAMILIES["Qwen3Moe"]), torch.float32)
    adapted(model)
    lora.check_groups(model, settings())
    named = "model.fsdp_config.wrap_policy.transformer_layer_cls_to_wrap=[Qwen3MoeDecoderLayer,Qwen3MoeExperts]"
    for keys in (large, named):
        with pytest.raises(ConfigError, match="min_num_params=0"):
            lora.check_groups(model, settings(keys))


def test_a_token_passes_the_adapters_of_its_experts_only() -> None:
    half, all_of_them = ({**FAMILIES["Qwen3Moe"], "num_experts_per_tok": number} for number in (2, 4))
    costs = []
    for family in (half, all_of_them):
        model = tiny_model(tiny_config("Qwen3Moe", **family), torch.float32)
        adapted(model, "model.target_modules=[]", "model.target_parameters=[experts.down_proj]")
        costs.append(cost_of(model).trained)
    assert costs[0] * 2 == costs[1] == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_muon_leaves_them_to_adamw() -> None:
    model = tiny_model(tiny_config("Qwen3Moe", **FAMILIES["Qwen3Moe"]), torch.float32)
    adapted(model)
    optim = compose(["data.train_files=x", "data.val_files=null", "optim.name=muon"]).config.optim
    groups = build_optimizer(model, optim).param_groups
    by_muon = {id(p) for group in groups if "momentum" in group for p in group["params"]}
    inside = {id(p) for _, outermost in experts.wrapped(model) for p in outermost.parameters()}
    assert by_muon
    assert not by_muon & inside

"""LoRA from outside: what is adapted, what is trained, and that merging changes nothing that the model says."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from apollo_sft.checkpoint.model_folder.rounding import cast
from apollo_sft.checkpoint.model_folder.write import save_adapter
from apollo_sft.config.compose import compose
from apollo_sft.config.schema import ModelConfig
from apollo_sft.errors import ConfigError, ModelError
from apollo_sft.model import adapter_files, lora
from apollo_sft.model.head import HeadSpec, attach_loss
from tests.support.exports import adapter_folder
from tests.support.models import save_tiny_adapter, save_tiny_model, tiny_config, tiny_model


def model_config(*overrides: str) -> ModelConfig:
    return compose(["data.train_files=x", "data.val_files=null", *overrides]).config.model


def adapted(*overrides: str, family: str = "Qwen2", **changes: Any) -> tuple[Any, lora.Adapted]:
    model = tiny_model(tiny_config(family, **changes), torch.float32)
    config = lora.lora_config(model_config("model.lora_rank=4", *overrides), "someone/base")
    return model, lora.inject(model, config, torch.float32)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(torch.arange(2, 20)[None]).logits


def test_all_linear_is_every_linear_module_but_the_head() -> None:
    _, found = adapted()
    layer = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert {name.rpartition(".")[2] for name in found.modules} == layer
    assert len(found.modules) == 2 * len(layer)


@pytest.mark.parametrize(
    ("targets", "expected"),
    [("[q_proj,v_proj]", {"q_proj", "v_proj"}), ("'.*layers.1.*up_proj'", {"up_proj"}), ("[lm_head]", {"lm_head"})],
)
def test_named_targets(targets: str, expected: set[str]) -> None:
    _, found = adapted(f"model.target_modules={targets}")
    assert {name.rpartition(".")[2] for name in found.modules} == expected


def test_only_adapters_are_trained_and_they_are_fp32_on_a_bf16_base() -> None:
    model = tiny_model(tiny_config(), torch.bfloat16)
    found = lora.inject(model, lora.lora_config(model_config("model.lora_rank=4"), "b"), torch.float32)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert all("lora_" in name and p.dtype == torch.float32 for name, p in trained.items())
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}
    assert found.num_trainable == sum(p.numel() for p in trained.values())
    assert f"{found.num_trainable:,}" in str(found)


def test_an_unknown_target_is_refused_by_its_key() -> None:
    with pytest.raises(ConfigError, match=r"model\.target_modules"):
        adapted("model.target_modules=[no_such_module]")


KINDS = {
    "plain": [],
    "rank-stabilised": ["model.use_rslora=true"],
    "DoRA": ["model.use_dora=true"],
    "on the head": ["model.target_modules=[q_proj,lm_head]"],
    "on the embedding": ["model.target_modules=[q_proj,embed_tokens]"],
    "with modules trained whole": ["model.modules_to_save=[lm_head,norm]"],
    "with an embedding trained whole": ["model.modules_to_save=[embed_tokens]", "model.use_dora=true"],
}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_merged_says_what_base_and_adapter_say(tmp_path: Path, kind: str, tied: bool) -> None:
    """As do plain PEFT with the files, and our own training that goes on with them."""
    if tied and kind in ("on the head", "on the embedding"):
        pytest.skip("refused: see below")
    base = save_tiny_model(tmp_path / "base", tiny_config(tie_word_embeddings=tied))
    model = AutoModelForCausalLM.from_pretrained(base)
    config = lora.lora_config(model_config("model.lora_rank=4", *KINDS[kind]), str(base))
    lora.inject(model, config, torch.float32)
    torch.testing.assert_close(logits(model), logits(AutoModelForCausalLM.from_pretrained(base)))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape) * 0.2)
    live = logits(model)
    written = adapter_folder(base, adapter_files.saved_config(model))
    save_adapter(adapter_files.adapter_tensors(model), written, tmp_path, model, is_writer=True)
    lora.merge(model, cast)
    assert not [name for name, _ in model.named_modules() if "lora" in name]
    torch.testing.assert_close(logits(model), live, rtol=1e-5, atol=1e-5)
    assert (logits(model) - logits(AutoModelForCausalLM.from_pretrained(base))).abs().max() > 0.1
    reloaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter")
    torch.testing.assert_close(logits(reloaded), live, rtol=1e-5, atol=1e-5)
    said = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert said["base_model_name_or_path"] == str(base)
    assert said["target_modules"] == sorted(said["target_modules"])
    again = AutoModelForCausalLM.from_pretrained(base)
    path = str(tmp_path / "adapter")
    continued = lora.lora_config(model_config(f"model.lora_adapter_path={path}"), str(base))
    found = lora.inject(again, continued, torch.float32, path)
    torch.testing.assert_close(logits(again), live, rtol=1e-5, atol=1e-5)
    assert bool(found.whole) == ("whole" in kind)


@pytest.mark.parametrize("name", ["lm_head", "embed_tokens"])
def test_a_tied_weight_is_not_adapted(name: str) -> None:
    with pytest.raises(ConfigError, match=r"model\.target_modules names a weight that two modules share"):
        adapted(f"model.target_modules=[q_proj,{name}]", tie_word_embeddings=True)


def test_what_cannot_be_adapted_so_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"model\.use_dora adapts linear modules"):
        adapted("model.target_modules=[lm_head]", "model.use_dora=true")
    with pytest.raises(ConfigError, match=r"model\.modules_to_save: the model has no module nothing"):
        adapted("model.modules_to_save=[nothing]")
    with pytest.raises(ConfigError, match=r"model\.modules_to_save and model\.target_modules name the same module"):
        adapted("model.modules_to_save=[mlp]")
    with pytest.raises(ConfigError, match=r"model\.fsdp_config\.wrap_policy\.min_num_params=0"):
        adapted("model.use_dora=true", "model.fsdp_config.wrap_policy.min_num_params=10")


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_an_adapter_on_the_head_is_in_the_loss(dropout: float) -> None:
    """At targets only, in chunks: the loss and gradients are those of PEFT's own forward on full logits."""
    model, _ = adapted("model.target_modules=[lm_head]", f"model.lora_dropout={dropout}")
    model.double()
    torch.nn.init.normal_(model.lm_head.lora_B["default"].weight)
    attach_loss(model.lm_head, HeadSpec())
    hidden = torch.randn(7, 32, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, 97, (7,))
    inputs = [hidden, model.lm_head.lora_A["default"].weight, model.lm_head.lora_B["default"].weight]

    def values(loss: torch.Tensor) -> list[torch.Tensor]:
        return [loss.detach(), *torch.autograd.grad(loss, inputs)]

    torch.manual_seed(0)
    ours = values(model.lm_head.loss(hidden, labels))
    torch.manual_seed(0)
    theirs = values(torch.nn.functional.cross_entropy(model.lm_head(hidden), labels, reduction="sum"))
    torch.testing.assert_close(ours, theirs)


def test_an_adapter_is_continued_with_its_own_rank_and_weights(tmp_path: Path) -> None:
    base = save_tiny_model(tmp_path / "base", tiny_config())
    path = save_tiny_adapter(base)
    config = lora.lora_config(model_config(f"model.lora_adapter_path={path}"), str(base))
    assert config.r == 3
    model = AutoModelForCausalLM.from_pretrained(base)
    lora.inject(model, config, torch.float32, str(path))
    expected = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), path)
    torch.testing.assert_close(logits(model), logits(expected))


def test_adapters_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    base = save_tiny_model(tmp_path / "base", tiny_config())
    path = save_tiny_adapter(base)
    with pytest.raises(ConfigError, match=r"model\.lora_rank"):
        lora.lora_config(model_config(f"model.lora_adapter_path={path}", "model.lora_rank=8"), "b")
    with pytest.raises(ConfigError, match=r"model\.lora_adapter_path"):
        lora.lora_config(model_config(f"model.lora_adapter_path={base}"), "b")
    file = path / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors.pop(next(iter(tensors)))
    save_file(tensors, file)
    config = lora.lora_config(model_config(f"model.lora_adapter_path={path}"), "b")
    with pytest.raises(ModelError, match="does not fit this model"):
        lora.inject(AutoModelForCausalLM.from_pretrained(base), config, torch.float32, str(path))

"""LoRA by the parts of a model, and without what is excluded: what is adapted and said, and what plain PEFT opens."""

import json
import tempfile
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from apollo_sft.checkpoint.model_folder.rounding import cast
from apollo_sft.config.compose import compose
from apollo_sft.config.schema import ModelConfig
from apollo_sft.errors import ConfigError
from apollo_sft.model import adapter_files, experts, lora
from apollo_sft.model.lora_targets import beside_language
from tests.support.exports import MOE
from tests.support.models import SMALL, tiny_config, tiny_model

LAYERS = 4
"""Of the language model: with more than 20 names in its list, PEFT shortens them."""
TEXT = SMALL | {"num_hidden_layers": LAYERS, "head_dim": 8}
IMAGES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
IMAGES |= {"image_size": 28, "patch_size": 14}
QWEN_IMAGES = {"depth": 2, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "out_hidden_size": 32}
ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}}
GLM_TEXT = TEXT | {"rope_parameters": ROPE["rope_parameters"] | {"mrope_section": [1, 1, 0]}}
GLM_TEXT |= {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
GLM_TEXT |= {"n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
GEMMA = {"text_config": TEXT, "vision_config": IMAGES, "mm_tokens_per_image": 4}
QWEN = {"text_config": TEXT | ROPE, "vision_config": QWEN_IMAGES}
MOE_TEXT = TEXT | ROPE | MOE
LAYER = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
LANGUAGE = "model.language_model."


def clip_and_llama() -> Any:
    images = transformers.CLIPVisionConfig(**IMAGES)
    return transformers.LlavaConfig(text_config=transformers.LlamaConfig(**TEXT), vision_config=images)


def pixtral_and_mistral() -> Any:
    images = transformers.PixtralVisionConfig(**IMAGES)
    return transformers.Mistral3Config(text_config=transformers.MistralConfig(**TEXT), vision_config=images)


FAMILIES: dict[str, tuple[Callable[[], Any], tuple[str, ...]]] = {
    "Gemma 3": (lambda: transformers.Gemma3Config(**GEMMA), ("model.vision_tower", "model.multi_modal_projector")),
    "LLaVA": (clip_and_llama, ("model.vision_tower", "model.multi_modal_projector")),
    "Mistral 3": (pixtral_and_mistral, ("model.vision_tower", "model.multi_modal_projector")),
    "Qwen2.5-VL": (lambda: transformers.Qwen2_5_VLConfig(**QWEN), ("model.visual",)),
    "GLM-4V, of experts that PEFT knows": (
        lambda: transformers.Glm4vMoeConfig(text_config=GLM_TEXT, vision_config=QWEN_IMAGES | {"image_size": 28}),
        ("model.visual",),
    ),
    "Qwen3-VL, of experts that PEFT does not know": (
        lambda: transformers.Qwen3VLMoeConfig(
            text_config=MOE_TEXT, vision_config=QWEN_IMAGES | {"deepstack_visual_indexes": [0]}
        ),
        ("model.visual",),
    ),
}


def model_config(*overrides: str) -> ModelConfig:
    return compose(["data.train_files=x", "data.val_files=null", *overrides]).config.model


def opened(folder: Path) -> Any:
    """Gemma 3 is a causal language model to transformers; others are not, or not yet."""
    gemma = json.loads((folder / "config.json").read_text())["model_type"] == "gemma3"
    return (AutoModelForCausalLM if gemma else AutoModelForImageTextToText).from_pretrained(folder)


@cache
def saved_base(family: str) -> dict[str, bytes]:
    """Build a model of a family, once; return its files by name."""
    make, _ = FAMILIES[family]
    model = AutoModelForImageTextToText.from_config(make(), dtype=torch.float32)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        for parameter in model.parameters():
            parameter.normal_(0, 0.2)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def base_on_disk(folder: Path, family: str) -> Any:
    for name, content in saved_base(family).items():
        (folder / name).write_bytes(content)
    return opened(folder)


def adapted(model: Any, *overrides: str) -> lora.Adapted:
    """With adapters, all of whose numbers matter."""
    found = lora.inject(model, lora.lora_config(model_config("model.lora_rank=4", *overrides), "b"), torch.float32)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return found


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(torch.arange(6, 40)[None]).logits


def names_with_adapters(model: Any) -> set[str]:
    return {
        name.removeprefix("base_model.model.") for name, module in model.named_modules() if hasattr(module, "lora_A")
    }


def linear_names(model: Any) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}


def save_adapter(model: Any, base: Path) -> None:
    adapter_files.saved_config(model).save_pretrained(base / "adapter")
    save_file(
        {n: t.contiguous() for n, t in adapter_files.adapter_tensors(model).items()},
        base / "adapter" / adapter_files.ADAPTER_FILE,
    )


def check_plain_peft(base: Path, model: Any, open_base: Callable[[Path], Any]) -> None:
    """Plain PEFT adapts the same modules of the base, and gives the same logits."""
    save_adapter(model, base)
    plain = open_base(base)
    without = logits(plain)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of names of tensors, for which PEFT looks among modules alone
        theirs = PeftModel.from_pretrained(plain, base / "adapter")
    assert names_with_adapters(theirs) == names_with_adapters(model)
    live = logits(model)
    torch.testing.assert_close(logits(theirs), live, rtol=1e-5, atol=1e-5)
    assert (without - live).abs().max() > 1e-3, "adapters that change nothing show nothing"


@pytest.mark.parametrize("family", FAMILIES)
def test_all_linear_is_the_language_models(tmp_path: Path, family: str) -> None:
    model = base_on_disk(tmp_path, family)
    linear, beside = linear_names(model), FAMILIES[family][1]
    assert beside_language(model) == beside
    found = adapted(model)
    of_language = {name for name in linear if name.startswith(LANGUAGE)}
    assert linear - of_language - {"lm_head"}, "there are others, which are not adapted"
    assert {name for name in found.modules if ".experts." not in name} == of_language - set(found.left)
    assert all(name.startswith(LANGUAGE) for name in found.modules)
    assert all(not name.startswith(beside) for name in names_with_adapters(model))
    has_experts = any(".experts." in name for name in found.modules)
    assert has_experts == ("experts" in family)
    assert f"language model {len(found.modules)} modules adapted (" in str(found)
    assert all(f", {name.rpartition('.')[2]} 0, " in str(found) for name in beside)
    check_plain_peft(tmp_path, model, opened)


def test_gemma_from_the_class_that_is_trained(tmp_path: Path) -> None:
    base_on_disk(tmp_path, "Gemma 3")
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    found = adapted(model, "model.target_modules=All-Linear")  # as PEFT reads it, too
    assert type(model).__name__ == "Gemma3ForConditionalGeneration"
    assert len(found.modules) == LAYERS * len(LAYER)
    assert {name.rpartition(".")[2] for name in found.modules} == LAYER
    kinds = ", ".join(sorted(LAYER))
    assert str(found).startswith(
        f"LoRA: language model {LAYERS * 7} modules adapted ({kinds}), vision_tower 0, multi_modal_projector 0, "
    )


def test_merged_and_the_same_on_ranks_without_weights(tmp_path: Path) -> None:
    model = base_on_disk(tmp_path, "Gemma 3")
    names = set(model.state_dict())
    with torch.device("meta"):
        elsewhere = AutoModelForCausalLM.from_config(model.config)
    config = lora.lora_config(model_config("model.lora_rank=4"), "b")
    assert lora.inject(elsewhere, config, torch.float32).modules == adapted(model).modules
    assert {n for n, _ in elsewhere.named_parameters()} == {n for n, _ in model.named_parameters()}
    live = logits(model)
    lora.merge(model, cast)
    assert set(model.state_dict()) == names
    torch.testing.assert_close(logits(model), live, rtol=1e-5, atol=1e-5)


def test_towers_among_the_layers_are_found() -> None:
    """transformers' config of this one is flat: nothing in it says which part reads text."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(transformers.Phi4MultimodalConfig(num_hidden_layers=2))
    found = lora.inject(model, lora.lora_config(model_config("model.lora_rank=4"), "b"), torch.float32)
    assert found.beside == ("model.embed_tokens_extend",)
    assert {name.rpartition(".")[2] for name in found.modules} == {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}
    assert all(name.startswith("model.layers.") for name in found.modules)


@pytest.mark.parametrize("targets", ["all-linear", "All-Linear"])
def test_in_models_of_text_nothing_changes(tmp_path: Path, targets: str) -> None:
    model = tiny_model(tiny_config(), torch.float32)
    assert beside_language(model) == ()
    found = adapted(model, f"model.target_modules={targets}")
    assert str(found).startswith(f"LoRA: 14 modules adapted ({', '.join(sorted(LAYER))}), ")
    plain = LoraConfig(r=4, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    theirs = get_peft_model(tiny_model(tiny_config(), torch.float32), plain)
    assert names_with_adapters(model) == names_with_adapters(theirs)
    adapter_files.saved_config(model).save_pretrained(tmp_path / "ours")
    theirs.peft_config["default"].save_pretrained(tmp_path / "theirs")
    ours, expected = (json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("ours", "theirs"))
    assert ours.pop("target_modules") == sorted(expected.pop("target_modules"))
    assert ours | {"base_model_name_or_path": None} == expected | {"base_model_name_or_path": None}


def test_what_a_model_of_text_has_beside_its_layers_is_adapted() -> None:
    model = tiny_model(tiny_config("Roberta", is_decoder=True), torch.float32)
    assert "lm_head.dense" in adapted(model).modules


def test_names_and_expressions_mean_what_they_say_in_every_part(tmp_path: Path) -> None:
    model = base_on_disk(tmp_path, "Gemma 3")
    found = adapted(model, "model.target_modules=[q_proj,v_proj]")
    assert f"language model {2 * LAYERS} modules adapted (q_proj, v_proj), vision_tower 4 (q_proj, v_proj)," in str(
        found
    )
    model = opened(tmp_path)
    found = adapted(model, "model.target_modules=[q_proj,v_proj]", "model.exclude_modules='.*vision_tower.*'")
    assert f"language model {2 * LAYERS} modules adapted (q_proj, v_proj), vision_tower 0," in str(found)
    assert len(found.modules) == 2 * LAYERS
    check_plain_peft(tmp_path, model, opened)


EXCLUDED: dict[str, tuple[str, Callable[[str], bool]]] = {
    "a list": ("[o_proj,layers.0.mlp.up_proj]", lambda name: name.endswith((".o_proj", ".layers.0.mlp.up_proj"))),
    "one name in a list": ("[o_proj]", lambda name: name.endswith(".o_proj")),
    "an expression": (r"'.*\.layers\.[01]\..*'", lambda name: ".layers.0." in name or ".layers.1." in name),
    "a tower, that is left out in any case": ("'.*vision_tower.*|.*o_proj'", lambda name: name.endswith("o_proj")),
    "the head, that is left out in any case": ("[lm_head]", lambda name: False),
}


@pytest.mark.parametrize("what", EXCLUDED)
def test_what_is_excluded_from_all_linear(tmp_path: Path, what: str) -> None:
    excluded, is_gone = EXCLUDED[what]
    model = base_on_disk(tmp_path, "Gemma 3")
    before = set(adapted(opened(tmp_path)).modules)
    found = adapted(model, f"model.exclude_modules={excluded}")
    assert set(found.modules) == {name for name in before if not is_gone(name)}
    assert found.left == (), "what is excluded was not asked for"
    check_plain_peft(tmp_path, model, opened)
    written = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["exclude_modules"]
    assert written == (excluded.strip("'") if excluded.startswith("'") else sorted(excluded.strip("[]").split(",")))


@pytest.mark.parametrize("targets", ["all-linear", "[q_proj,k_proj,o_proj]", "'.*self_attn.*_proj'"])
def test_what_is_excluded_in_models_of_text(tmp_path: Path, targets: str) -> None:
    tiny_model(tiny_config(), torch.float32).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    found = adapted(model, f"model.target_modules={targets}", "model.exclude_modules=[k_proj,o_proj]")
    assert "q_proj" in str(found)
    assert not [name for name in found.modules if name.endswith(("k_proj", "o_proj"))]
    check_plain_peft(tmp_path, model, AutoModelForCausalLM.from_pretrained)


TENSORS = {f"model.layers.{layer}.mlp.experts.{name}" for layer in range(2) for name in ("gate_up_proj", "down_proj")}
OF_EXPERTS: dict[str, tuple[tuple[str, ...], set[str]]] = {
    "by their module": (("model.exclude_modules=[experts]",), set()),
    "by an expression": (("model.exclude_modules='.*experts.*'",), set()),
    "of one layer": ((r"model.exclude_modules='.*\.0\.mlp\.experts'",), {n for n in TENSORS if ".1." in n}),
    "one tensor": (("model.exclude_modules=[gate_up_proj]",), {n for n in TENSORS if "down" in n}),
    "one tensor in full": (
        ("model.exclude_modules=[model.layers.1.mlp.experts.down_proj]",),
        TENSORS - {"model.layers.1.mlp.experts.down_proj"},
    ),
    "as files call them": (("model.exclude_modules=[gate_proj,up_proj]",), {n for n in TENSORS if "down" in n}),
    "as files call them, by an expression": ((r"model.exclude_modules='.*\.(gate|up|down)_proj'",), set()),
    "of tensors by name": (
        (
            "model.target_modules=[q_proj]",
            "model.target_parameters=[experts.down_proj]",
            r"model.exclude_modules='.*\.0\..*'",
        ),
        {"model.layers.1.mlp.experts.down_proj"},
    ),
    "of modules by an expression": (
        (r"model.target_modules='.*(q|gate|up|down)_proj'", "model.exclude_modules='.*experts.*'"),
        set(),
    ),
    "with dropout, which they do not know": (("model.exclude_modules=[experts]", "model.lora_dropout=0.1"), set()),
}


@pytest.mark.parametrize("what", OF_EXPERTS)
def test_experts_are_excluded(tmp_path: Path, what: str) -> None:
    """PEFT itself excludes modules alone: what is left is written in names of tensors."""
    keys, expected = OF_EXPERTS[what]
    tiny_model(tiny_config("Qwen3Moe", **MOE), torch.float32).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "You have passed exclude_modules")  # PEFT, of names of tensors
        found = adapted(model, *keys)
    assert {name for name in found.modules if ".experts." in name} == expected
    assert any(name.endswith("q_proj") for name in found.modules)
    assert {f"{n}.{w.parameter_name}" for n, e in experts.wrapped(model) for w in experts.wrappers(e)} == expected
    assert not set(found.left) & TENSORS
    check_plain_peft(tmp_path, model, AutoModelForCausalLM.from_pretrained)


def test_experts_beside_a_tower_are_excluded(tmp_path: Path) -> None:
    """PEFT takes names of linear modules for experts, wherever it reads them: none of these may stay in the list."""
    model = base_on_disk(tmp_path, "GLM-4V, of experts that PEFT knows")
    found = adapted(model, "model.exclude_modules=[experts]")
    assert len(found.modules) == 4 * LAYERS
    assert {name.rpartition(".")[2] for name in found.modules} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    check_plain_peft(tmp_path, model, opened)


REFUSED = {
    "excludes nothing.*\n.*q_porj\n.*ends of names.*\n.*did you mean q_proj": ["model.exclude_modules=[o_proj,q_porj]"],
    r"excludes nothing.*\n.*layer\\\.1.*\n.*such as model\.layers": [r"model.exclude_modules='.*\.layer\.1\..*'"],
    "excludes nothing.*\n.*: +mlp\n": ["model.exclude_modules=[mlp]"],
    "excludes nothing.*\n.*: +v_proj\n": ["model.exclude_modules=[v_proj]", "model.target_modules=[q_proj]"],
    "excludes nothing.*\n.*: +gate_proj\n": ["model.exclude_modules=[gate_proj]"],
    "excludes everything.*\n.*2 modules .q_proj": ["model.exclude_modules=[q_proj]", "model.target_modules=[q_proj]"],
    "excludes everything.*\n.*12 modules": ["model.exclude_modules='.*'"],
    "excludes everything.*\n.*2 modules .down_proj": [
        "model.target_modules=[]",
        "model.target_parameters=[experts.down_proj]",
        "model.exclude_modules=[experts]",
    ],
    "no regular expression.*\n.*unterminated": ["model.exclude_modules='(o_proj'"],
}


@pytest.mark.parametrize("message", REFUSED)
def test_wrong_turns_are_refused(message: str) -> None:
    model = tiny_model(tiny_config("Qwen3Moe", **MOE), torch.float32)
    with pytest.raises(ConfigError, match=rf"model\.exclude_modules.*{message}"):
        adapted(model, *REFUSED[message])


def test_everything_of_a_language_model_is_everything(tmp_path: Path) -> None:
    model = base_on_disk(tmp_path, "Gemma 3")
    with pytest.raises(ConfigError, match=f"excludes everything.*\n.*{LAYERS * 7} modules"):
        adapted(model, "model.exclude_modules='.*language_model.*'")


def test_an_adapter_that_is_continued_keeps_its_own(tmp_path: Path) -> None:
    model = base_on_disk(tmp_path, "Gemma 3")
    first = adapted(model, "model.exclude_modules=[o_proj,k_proj]")
    live = logits(model)
    save_adapter(model, tmp_path)
    path = str(tmp_path / "adapter")
    for keys in ((), ("model.exclude_modules=[k_proj,o_proj]", "model.lora_rank=4")):
        again = opened(tmp_path)
        config = lora.lora_config(model_config(f"model.lora_adapter_path={path}", *keys), "b")
        assert lora.inject(again, config, torch.float32, path).modules == first.modules
        torch.testing.assert_close(logits(again), live, rtol=1e-5, atol=1e-5)
    for other in ("[o_proj]", "'.*o_proj'"):
        keys = (f"model.lora_adapter_path={path}", f"model.exclude_modules={other}")
        with pytest.raises(
            ConfigError, match=r"model\.exclude_modules is not that .*\n.*o_proj, and k_proj, o_proj in "
        ):
            lora.lora_config(model_config(*keys), "b")


def test_what_a_continued_adapter_excludes_may_be_nothing(tmp_path: Path) -> None:
    """PEFT wrote it, and it is the adapter that it is: with a name that excludes nothing, and with a tower."""
    settings = {"r": 3, "target_modules": ["q_proj"], "exclude_modules": ["vision_tower"]}
    base_on_disk(tmp_path, "Gemma 3")
    theirs = get_peft_model(opened(tmp_path), LoraConfig(**settings))
    theirs.save_pretrained(tmp_path / "adapter")
    path, model = str(tmp_path / "adapter"), opened(tmp_path)
    found = lora.inject(
        model, lora.lora_config(model_config(f"model.lora_adapter_path={path}"), "b"), torch.float32, path
    )
    assert set(found.modules) == names_with_adapters(theirs)
    assert ", vision_tower 2 (q_proj), " in str(found)


def test_a_continued_adapter_has_the_tensors_that_it_names(tmp_path: Path) -> None:
    """PEFT excludes no tensors, whatever `exclude_modules` says of their module."""
    settings = {"r": 3, "target_modules": ["q_proj"], "target_parameters": ["experts.down_proj"]}
    tiny_model(tiny_config("Qwen3Moe", **MOE), torch.float32).save_pretrained(tmp_path)
    base = AutoModelForCausalLM.from_pretrained
    get_peft_model(base(tmp_path), LoraConfig(**settings, exclude_modules=["experts"])).save_pretrained(
        tmp_path / "adapter"
    )
    path = str(tmp_path / "adapter")
    config = lora.lora_config(model_config(f"model.lora_adapter_path={path}"), "b")
    found = lora.inject(base(tmp_path), config, torch.float32, path)
    assert {name for name in found.modules if "experts" in name} == {name for name in TENSORS if "down" in name}

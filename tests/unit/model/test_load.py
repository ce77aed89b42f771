"""Which base models are found, read and refused, before and while their weights are read."""

import json
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file

from apollo_sft.errors import ModelError
from apollo_sft.model import attention, load
from tests.support.models import save_tiny_model, tiny_config


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    attention.register(attention.sdpa_kernel)
    return save_tiny_model(tmp_path / "base", tiny_config())


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_weights_load_in_the_wanted_dtype(folder: Path) -> None:
    config = load.read_config(load.find_model(str(folder)), False)
    load.check_architecture(config, False)
    model = load.load_with_weights(folder, config, torch.float64, False)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float64}
    assert model.config._attn_implementation == attention.NAME
    stored = load_file(folder / "model.safetensors")
    assert torch.equal(model.model.layers[1].mlp.up_proj.weight.float(), stored["model.layers.1.mlp.up_proj.weight"])


def test_meta_build_has_the_same_parameters_and_no_memory(folder: Path) -> None:
    config = load.read_config(folder, False)
    real = load.load_with_weights(folder, config, torch.float32, False)
    meta = load.build_on_meta(config, torch.float32, False)
    assert {name: p.shape for name, p in meta.named_parameters()} == {n: p.shape for n, p in real.named_parameters()}
    assert all(tensor.is_meta for tensor in [*meta.parameters(), *meta.buffers()])


def test_a_missing_folder_and_an_unreachable_hub_id_say_what_was_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ModelError, match=r"model\.partial_pretrain is not a model folder"):
        load.find_model(str(tmp_path / "nothing"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match="could not be downloaded from the hub"):
        load.find_model("someone/some-model-that-is-not-cached")


def test_a_folder_without_or_with_broken_config(folder: Path) -> None:
    (folder / "config.json").write_text("{ not json")
    with pytest.raises(ModelError, match="not valid JSON"):
        load.read_config(folder, False)
    (folder / "config.json").unlink()
    with pytest.raises(ModelError, match=r"no config\.json"):
        load.read_config(folder, False)


def test_remote_code_is_not_run_unless_asked_for(folder: Path) -> None:
    edit_config(folder, auto_map={"AutoModelForCausalLM": "evil.Model"})
    with pytest.raises(ModelError, match=r"model\.trust_remote_code=true"):
        load.read_config(folder, False)


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("Mamba", "linear_attention"),
        ("Bloom", "bypasses transformers' AttentionInterface"),
        ("T5", "not a causal language model"),
    ],
)
def test_architectures_that_cannot_be_exact_are_refused_by_name(family: str, reason: str) -> None:
    import transformers

    with pytest.raises(ModelError, match=reason) as caught:
        load.check_architecture(getattr(transformers, f"{family}Config")(), False)
    assert family in str(caught.value)


def test_layers_that_carry_state_are_refused_by_their_type() -> None:
    config = tiny_config("Qwen3", head_dim=8)
    config.layer_types = ["full_attention", "linear_attention"]
    with pytest.raises(ModelError, match="linear_attention"):
        load.check_architecture(config, False)


def test_missing_weights_are_never_initialised_at_random(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"1 missing.*model\.layers\.1\.mlp\.up_proj\.weight"):
        load.load_with_weights(folder, load.read_config(folder, False), torch.float32, False)


def test_pickled_weights_are_not_read(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="pickled weights are not read"):
        load.load_with_weights(folder, load.read_config(folder, False), torch.float32, False)


def test_a_router_loss_that_is_asked_for_is_refused_and_one_without_weight_is_not() -> None:
    asks = tiny_config("Mixtral", num_local_experts=4, output_router_logits=True)
    with pytest.raises(ModelError, match=r"auxiliary loss of its router(.|\n)*output_router_logits"):
        load.check_architecture(asks, False)
    asks.router_aux_loss_coef = 0.0
    load.check_architecture(asks, False)


def test_attention_that_is_not_causal_is_refused() -> None:
    with pytest.raises(ModelError, match="use_bidirectional_attention"):
        load.check_architecture(tiny_config("Gemma3Text", head_dim=8, use_bidirectional_attention=True), False)


def test_the_layers_of_a_multimodal_model_are_those_of_its_text_part() -> None:
    import transformers

    hybrid = tiny_config("Gemma3Text", head_dim=8, layer_types=["full_attention", "chunked_attention"])
    with pytest.raises(ModelError, match="chunked_attention"):
        load.check_architecture(transformers.Gemma3Config(text_config=hybrid.to_dict()), False)


def test_documents_beyond_the_original_length_are_refused_under_longrope() -> None:
    factors = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "type": "longrope"}
    config = tiny_config("Phi3", original_max_position_embeddings=32, rope_scaling=factors)
    load.check_longest(config, 32)
    with pytest.raises(ModelError, match=r"data\.max_length=32"):
        load.check_longest(config, 33)
    load.check_longest(tiny_config(), 10**9)


@pytest.mark.parametrize("weights", [True, False])
def test_weights_of_a_hub_model_are_downloaded_only_where_they_are_read(
    weights: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hub's own filter decides over the names of a usual repository."""
    fetched: list[str] = []
    names = ["config.json", "tokenizer.json", "model.safetensors.index.json", "model-00001-of-00002.safetensors"]

    def snapshot_download(source: str, **patterns: Any) -> str:
        fetched.extend(filter_repo_objects(names, **patterns))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert load.find_model("a/b", weights) == tmp_path
    assert set(fetched) == (set(names) if weights else set(names[:2]))

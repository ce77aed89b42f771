"""Precisions, and the model of one process."""

from pathlib import Path
from typing import Any

import pytest
import torch

from apollo_sft.config.compose import compose
from apollo_sft.errors import ConfigError
from apollo_sft.model import attention, load
from apollo_sft.parallel.launch import World
from apollo_sft.parallel.mesh import Mesh
from apollo_sft.train.assemble import assemble
from apollo_sft.train.precision import resolve_precision
from apollo_sft.train.sharding import needs_group
from tests.support.models import save_tiny_model, tiny_config

FP64, FP32, BF16 = torch.float64, torch.float32, torch.bfloat16


def config_of(*overrides: str) -> Any:
    return compose(["data.train_files=x", "data.val_files=null", *overrides]).config


@pytest.mark.parametrize(
    ("overrides", "on_cuda", "expected"),
    [
        ([], False, (FP32, FP32, FP32)),
        ([], True, (FP32, BF16, FP32)),
        (["dtype=fp32"], True, (FP32, FP32, FP32)),
        (["dtype=bf16"], False, (FP32, BF16, FP32)),
        (["model_dtype=fp64"], True, (FP64, FP64, FP64)),
        (["model_dtype=bf16"], False, (BF16, BF16, FP32)),
        (["model_dtype=bf16"], True, (BF16, BF16, FP32)),
    ],
)
def test_precisions(overrides: list[str], on_cuda: bool, expected: tuple[torch.dtype, ...]) -> None:
    config = config_of(*(f"model.fsdp_config.{override}" for override in overrides))
    precision = resolve_precision(config.model, on_cuda)
    assert (precision.master, precision.compute, precision.reduce) == expected
    assert precision.mixed == (expected[0] != expected[1])


def test_one_process_needs_a_group_for_what_sharding_does() -> None:
    assert not needs_group(config_of().model, on_cuda=False)
    assert needs_group(config_of().model, on_cuda=True)
    assert needs_group(config_of("model.fsdp_config.dtype=bf16").model, on_cuda=False)
    assert needs_group(config_of("model.fsdp_config.cpu_offload=true").model, on_cuda=False)
    assert needs_group(config_of("model.fsdp_config.offload_params=true").model, on_cuda=False)


def assembled(base: Path, *overrides: str) -> Any:
    config = config_of(f"model.partial_pretrain={base}", *overrides)
    world = World(0, 1, 0, torch.device("cpu"))
    return assemble(config, base, load.read_config(base, False), world, Mesh(0, 1, 0, 1, None))


def test_the_model_of_one_process_is_the_one_on_disk(tmp_path: Path) -> None:
    base = save_tiny_model(tmp_path, tiny_config("Qwen2", tie_word_embeddings=True), BF16)
    model, optimizer = assembled(base)
    expected = load.load_with_weights(base, load.read_config(base, False), FP32, False).state_dict()
    assert model.training
    for name, value in model.causal_lm.state_dict().items():
        assert value.dtype == FP32
        assert torch.equal(value, expected[name])
    assert model.causal_lm.lm_head.weight is model.causal_lm.model.embed_tokens.weight
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    assert len(trained) == len(list(model.parameters()))


@pytest.mark.parametrize("wanted", ["true", "false"])
def test_checkpointing_is_switched_by_its_key(tmp_path: Path, wanted: str) -> None:
    base = save_tiny_model(tmp_path, tiny_config("Qwen2"))
    model, _ = assembled(base, f"model.enable_gradient_checkpointing={wanted}")
    assert model.causal_lm.is_gradient_checkpointing == (wanted == "true")


def test_a_kernel_that_cannot_run_is_refused_before_weights_are_read(tmp_path: Path) -> None:
    base = save_tiny_model(tmp_path, tiny_config("Qwen2"))
    (base / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match="attn_implementation needs a CUDA device"):
        assembled(base, "model.attn_implementation=varlen")
    attention.register(attention.sdpa_kernel)

"""Which modules are held in 4 bits, what they compute, and what a plan makes of them."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from apollo_sft.config.compose import compose
from apollo_sft.config.schema import ModelConfig
from apollo_sft.config.values import with_values
from apollo_sft.errors import ConfigError, ModelError
from apollo_sft.model import attention, four_bit, load, lora
from apollo_sft.model.flops import cost_of
from apollo_sft.model.four_bit import FourBitLinear, four_bit_modules
from apollo_sft.tools.plan.memory import PARAMETERS, Pack, Ranks, meta_model, step_memory
from apollo_sft.tools.verify import setup as rehearsal
from apollo_sft.train.start_checks import start_of
from tests.support.models import tiny_config

BASE = ("data.train_files=none", "data.val_files=null")
QLORA = ("model.lora_rank=4", "model.load_in_4bit=true")
SIZES = {"hidden_size": 64, "intermediate_size": 96}
"""Rows of down_proj are no multiple of a block."""
EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "shared_expert_intermediate_size": 64,
}
PROJECTIONS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj"}
CUDA = torch.device("cuda")
needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="needs the extra: pip install 'apollo-sft[qlora]'"
)


def model_config(*keys: str) -> ModelConfig:
    return compose([*BASE, *QLORA, *keys]).config.model


def on_meta(family: str, *keys: str, **sizes: int) -> tuple[torch.nn.Module, str]:
    """The model with adapters, and what is said of it."""
    attention.register(attention.sdpa_kernel)
    config = model_config(*keys)
    adapter = lora.lora_config(config, "base")
    built = load.build_on_meta(tiny_config(family, **(SIZES | sizes)), torch.bfloat16, False)
    causal_lm = four_bit.quantised(config, built, adapter)
    return causal_lm, str(lora.inject(causal_lm, adapter, torch.float32))


def held(causal_lm: nn.Module) -> set[str]:
    return {name.removesuffix(".base_layer").rpartition(".")[2] for name, _ in four_bit_modules(causal_lm)}


def test_linear_modules_with_whole_blocks_are_held_in_4_bits() -> None:
    causal_lm, said = on_meta("Llama")
    assert held(causal_lm) == PROJECTIONS
    weights = 2 * (2 * 64 * 64 + 2 * 64 * 32 + 2 * 64 * 96)
    assert f"12 linear modules with {weights:,} weights in 4 bits" in said
    assert "2 linear modules not, since their rows are no multiple of 64 weights" in said
    modules = [module for _, module in four_bit_modules(causal_lm)]
    assert sum(p.numel() * p.element_size() for m in modules for p in (m.weight, m.absmax)) == weights * 4.5 / 8
    assert not any(p.requires_grad for m in modules for p in m.parameters())


def test_a_model_that_fits_whole_says_so() -> None:
    causal_lm, said = on_meta("Llama", intermediate_size=128)
    assert held(causal_lm) == PROJECTIONS | {"down_proj"}
    assert "as they are" not in said


def test_counts_are_those_of_the_weights() -> None:
    plain, _ = on_meta("Llama", "model.load_in_4bit=false")
    causal_lm, said = on_meta("Llama")
    assert cost_of(causal_lm) == cost_of(plain)
    assert sum(four_bit.num_weights(causal_lm).values()) == sum(p.numel() for p in plain.parameters())
    assert four_bit.num_bytes_read(causal_lm) == sum(p.numel() * p.element_size() for p in plain.parameters())
    assert f"of {sum(p.numel() for p in plain.parameters()):,} parameters trained" in said


def test_routers_and_experts_in_one_tensor_stay_as_they_are() -> None:
    causal_lm, said = on_meta("Qwen2Moe", "model.target_modules=[q_proj]", **EXPERTS)
    gates = [module for name, module in causal_lm.named_modules() if name.endswith("shared_expert_gate")]
    assert len(gates) == 2
    assert all(type(gate) is nn.Linear and gate.weight.dtype == torch.bfloat16 for gate in gates)
    assert held(causal_lm) == PROJECTIONS | {"down_proj"}  # of the shared expert
    experts = 2 * 4 * 3 * 64 * 64
    assert f"; {experts:,} weights of fused experts not" in said


def test_what_is_trained_whole_is_not_held_in_4_bits() -> None:
    causal_lm, _ = on_meta("Llama", "model.modules_to_save=[mlp,k_proj]", "model.target_modules=[q_proj]")
    assert held(causal_lm) == {"q_proj", "v_proj", "o_proj"}
    assert causal_lm.get_submodule("model.layers.0.mlp.up_proj").weight.requires_grad


def test_adapted_heads_and_embeddings_are_not_held_in_4_bits() -> None:
    sizes = {"tie_word_embeddings": False}
    causal_lm, said = on_meta("Llama", "model.target_modules=[lm_head,embed_tokens,v_proj]", **sizes)
    assert held(causal_lm) == PROJECTIONS
    assert "5" not in said.partition(" modules")[0] and "4 modules adapted (embed_tokens, lm_head, v_proj)" in said


def test_a_model_without_such_a_module_is_refused() -> None:
    with pytest.raises(ModelError, match="no module that can be quantised"):
        on_meta("Llama", hidden_size=32)


def test_nothing_changes_without_the_key() -> None:
    causal_lm, said = on_meta("Llama", "model.load_in_4bit=false")
    assert held(causal_lm) == set()
    assert "4 bits" not in said


def test_dora_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="DoRA reads the weights"):
        lora.lora_config(model_config("model.use_dora=true"), "base")


def test_it_needs_cuda_and_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="needs CUDA"):
        four_bit.check(model_config(), torch.device("cpu"))
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ConfigError, match=r"pip install 'apollo-sft\[qlora\]'"):
        four_bit.check(model_config(), CUDA)
    four_bit.check(model_config("model.load_in_4bit=false"), CUDA)


def test_an_export_without_the_package_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    attention.register(attention.sdpa_kernel)
    config = model_config()
    model = load.build_on_meta(tiny_config("Llama", **SIZES), torch.float32, False).to_empty(device="cpu")
    with pytest.raises(ConfigError, match=r"pip install 'apollo-sft\[qlora\]'"):
        four_bit.quantised(config, model, lora.lora_config(config, "base"))


def test_all_hosts_need_the_same_bitsandbytes() -> None:
    configs = [compose([*BASE, QLORA[0], f"model.load_in_4bit={held}"]).config for held in ("true", "false")]
    assert ["version of bitsandbytes" in start_of(config) for config in configs] == [True, False]


def test_verify_holds_nothing_in_4_bits() -> None:
    """It computes in float64, which bitsandbytes does not know."""
    config = compose([*BASE, *QLORA]).config
    assert not with_values(config, rehearsal._changes(config.data)).model.load_in_4bit


def test_a_plan_counts_half_a_byte_and_the_scales() -> None:
    """And one matrix at a time in full, without bitsandbytes or a value."""
    hf_config = tiny_config("Llama", **(SIZES | {"intermediate_size": 4096, "tie_word_embeddings": False}))
    ranks, pack = Ranks(2, on_cuda=True), Pack((4,), 4)
    configs = [compose([*BASE, "model.lora_rank=4", f"model.load_in_4bit={held}"]).config for held in ("true", "false")]
    four, sixteen = (step_memory(config, hf_config, ranks, pack, 1) for config in configs)
    parameters = [m for m in meta_model(configs[0].model, hf_config, ranks).parameters() if m.dtype == torch.uint8]
    saved = sum(p.numel() for p in parameters) * (16 - 4.5) / 4.5 / 2
    assert sixteen.parts[PARAMETERS] - four.parts[PARAMETERS] == saved
    one_matrix = 64 * 4096 * 2
    assert one_matrix <= four.parts["working memory"] < 1.5 * one_matrix
    assert sixteen.parts["working memory"] < one_matrix / 2


def pair(dtype: torch.dtype, bias: bool = True) -> tuple[FourBitLinear, nn.Module, nn.Linear]:
    """Ours and bitsandbytes' own, of the same linear module, which comes last."""
    import bitsandbytes

    torch.manual_seed(0)
    plain = nn.Linear(192, 80, bias=bias, dtype=dtype).requires_grad_(False)
    other = bitsandbytes.nn.Linear4bit(192, 80, bias, dtype, compress_statistics=False, quant_type="nf4")
    other.load_state_dict({name: tensor.clone() for name, tensor in plain.state_dict().items()})
    return FourBitLinear(plain, *four_bit._quantised(plain.weight, torch.device("cpu"))), other.to("cpu"), plain


def product(module: nn.Module, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Of three dims, and the gradient of what came in."""
    torch.manual_seed(1)
    x, grad = torch.randn(2, 7, 192, dtype=dtype, requires_grad=True), torch.randn(2, 7, 80, dtype=dtype)
    out = module(x)
    out.backward(grad)
    assert x.grad is not None
    return out.detach(), x.grad


@needs_bitsandbytes
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_codes_and_products_are_those_of_bitsandbytes(dtype: torch.dtype, bias: bool) -> None:
    ours, theirs, _ = pair(dtype, bias)
    assert torch.equal(ours.weight.view(-1), theirs.weight.data.view(-1))
    assert torch.equal(ours.absmax.view(torch.float32).view(-1), theirs.weight.quant_state.absmax)
    for mine, other in zip(product(ours, dtype), product(theirs, dtype), strict=True):
        torch.testing.assert_close(mine, other)


@needs_bitsandbytes
def test_the_product_is_that_with_the_weight_it_shows() -> None:
    ours, _, plain = pair(torch.float32)
    off = (ours.dense() - plain.weight).abs().max() / plain.weight.abs().max()
    assert 0.01 < off < 0.1525, "half of the widest gap between two values of NF4 is 0.1519"
    plain.weight.copy_(ours.dense())
    for mine, other in zip(product(ours, torch.float32), product(plain, torch.float32), strict=True):
        torch.testing.assert_close(mine, other)
    as_plain = ours.plain(ours.dense())
    assert type(as_plain) is nn.Linear and torch.equal(as_plain.weight, plain.weight) and as_plain.bias is plain.bias


@needs_bitsandbytes
def test_only_bytes_are_kept_for_the_backward() -> None:
    ours, _, _ = pair(torch.float32)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: (kept.append(tensor), tensor)[1], lambda t: t):
        ours(torch.randn(7, 192, requires_grad=True))
    assert [tensor.dtype for tensor in kept] == [torch.uint8, torch.uint8]
    assert sum(tensor.numel() for tensor in kept) == 192 * 80 * 4.5 / 8


@needs_bitsandbytes
def test_a_rank_without_a_row_has_no_weights() -> None:
    ours, _, _ = pair(torch.float32)
    assert four_bit.dequantised(ours.weight[:0], ours.absmax[:0], torch.float32).shape == (0, 192)

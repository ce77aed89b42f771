"""Frozen linear modules in 4 bits: bitsandbytes' NF4, sharded by rows like every other weight.

What bitsandbytes' own module needs beside its codes lies outside of the parameters, where sharding loses it. Here it
is a parameter too.

Source: QLoRA, arXiv:2305.14314.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.tensor import DTensor

from apollo_sft.config.schema import ModelConfig
from apollo_sft.errors import ConfigError, ModelError

BLOCK = 64
"""Weights of a row that share a scale: 4 bits each, and a float32 for all of them."""
ROUTERS = ("gate", "router")
"""Ends of the names of modules that choose experts: small, and a choice is not nearly the same."""
CPU = torch.device("cpu")


class FourBitLinear(nn.Linear):
    """A frozen linear module. `weight`: uint8 of shape (out features, in features / 2), two codes a byte. `absmax`: the
    scale of each block, a float32 as four bytes: uint8 of shape (out features, in features / 16).

    Bytes, because mixed precision casts floats. `dtype`: of the products.
    """

    def __init__(self, plain: nn.Linear, weight: Tensor, absmax: Tensor) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = plain.in_features, plain.out_features
        self.dtype = plain.weight.dtype
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.absmax = nn.Parameter(absmax, requires_grad=False)
        self.bias = plain.bias

    def forward(self, input: Tensor) -> Tensor:
        parts = (self.weight, self.absmax, self.bias, self.dtype)
        return cast(Tensor, _Product.apply(input, *parts))  # type: ignore[no-untyped-call]

    def dense(self) -> Tensor:
        """The weight that it multiplies with, of shape (out features, in features), sharded as the codes are."""
        if not isinstance(self.weight, DTensor):
            return dequantised(self.weight, self.absmax, self.dtype)
        assert isinstance(self.absmax, DTensor), "both are sharded, or none"
        rows = dequantised(self.weight.to_local(), self.absmax.to_local(), self.dtype)
        whole = torch.Size((self.out_features, self.in_features))
        mesh, placements = self.weight.device_mesh, self.weight.placements
        return DTensor.from_local(rows, mesh, placements, shape=whole, stride=(self.in_features, 1))

    def plain(self, weight: Tensor) -> nn.Linear:
        """An ordinary module with this weight and the same bias. It lies on the CPU: there the model was read from."""
        linear = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        linear.weight = nn.Parameter(weight.to(CPU), requires_grad=False)
        linear.bias = self.bias
        return linear


class _Product(torch.autograd.Function):
    """The weight is formed for a product and given up after it; in the backward it is formed once more."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, codes: Tensor, absmax: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(codes, absmax)
        ctx.dtype = dtype
        return nn.functional.linear(x, dequantised(codes, absmax, dtype), bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        codes, absmax = ctx.saved_tensors
        return grad @ dequantised(codes, absmax, ctx.dtype), None, None, None, None


def dequantised(codes: Tensor, absmax: Tensor, dtype: torch.dtype) -> Tensor:
    """The rows that these bytes stand for."""
    shape = (codes.shape[0], 2 * codes.shape[1])
    if isinstance(codes, FakeTensor) or not codes.numel():  # `plan` needs no bitsandbytes; a rank may hold no row
        return codes.new_empty(shape, dtype=dtype)
    scales = absmax.view(torch.float32).view(-1)
    return cast(Tensor, _operators().dequantize_4bit(codes.view(-1, 1), scales, BLOCK, "nf4", shape, dtype))


def _quantised(weight: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """Codes and scales as a `FourBitLinear` holds them, where `weight` lies. Formed on `device`."""
    rows, width = weight.shape
    if weight.is_meta:
        return tuple(torch.empty(rows, width // n, dtype=torch.uint8, device="meta") for n in (2, 16))  # type: ignore[return-value]
    codes, scales = _operators().quantize_4bit(weight.to(device), BLOCK, "nf4", torch.uint8)
    codes, scales = codes.to(weight.device), scales.to(weight.device)
    return codes.view(rows, width // 2), scales.view(rows, width // BLOCK).view(torch.uint8)


def _operators() -> Any:
    """Raises: ConfigError when bitsandbytes is not there."""
    try:
        import bitsandbytes  # noqa: F401 - registers its operators
    except ImportError as error:
        raise ConfigError(
            "model.load_in_4bit=true needs bitsandbytes",
            found=str(error).splitlines()[0],
            fix="pip install 'apollo-sft[qlora]', or model.load_in_4bit=false",
        ) from error
    return torch.ops.bitsandbytes


def check(config: ModelConfig, device: torch.device) -> None:
    """Raises: ConfigError when 4 bits are asked for, and a training on `device` cannot have them."""
    if config.load_in_4bit and device.type != "cuda":
        raise ConfigError(
            "model.load_in_4bit=true needs CUDA", found=f"the device {device.type}", fix="model.load_in_4bit=false"
        )
    if config.load_in_4bit:
        _operators()


def quantised(config: ModelConfig, causal_lm: Any, adapter: Any, device: torch.device = CPU) -> Any:
    """`causal_lm`: as it is, or changed in place where `config` asks for 4 bits; on meta without memory.

    Matrix after matrix: nothing is there twice. They are formed on `device` and stay where they were. `adapter`: PEFT's
    config, whose `modules_to_save` stay as they are.
    Raises: ModelError when nothing can be held so; ConfigError when bitsandbytes is not there.
    """
    if not config.load_in_4bit:
        return causal_lm
    chosen = [(name, linear) for name, linear in _linear(causal_lm, adapter.modules_to_save or ()) if _fits(linear)]
    if not chosen:
        raise ModelError(
            f"model.load_in_4bit: {type(causal_lm).__name__} has no module that can be held in 4 bits",
            expected=f"linear modules outside of the head, with rows of a multiple of {BLOCK} weights",
            fix="model.load_in_4bit=false",
        )
    with torch.no_grad():
        while chosen:
            name, linear = chosen.pop()
            causal_lm.set_submodule(name, FourBitLinear(linear, *_quantised(linear.weight, device)))
    return causal_lm


def _linear(causal_lm: Any, kept: Sequence[str]) -> Iterator[tuple[str, nn.Linear]]:
    """Linear modules that are no head, no router, and not in a module whose name ends in one of `kept`."""
    head = causal_lm.get_output_embeddings()
    for name, module in causal_lm.named_modules():
        above = accumulate(name.split("."), "{}.{}".format)
        plain = type(module) is nn.Linear and module is not head and not name.endswith(ROUTERS)
        if plain and not any(part.endswith(tuple(kept)) for part in above):
            yield name, module


def _fits(linear: nn.Linear) -> bool:
    return linear.in_features % BLOCK == 0


def four_bit_modules(model: nn.Module) -> list[tuple[str, FourBitLinear]]:
    return [(name, module) for name, module in model.named_modules() if isinstance(module, FourBitLinear)]


def num_weights(model: nn.Module) -> dict[int, int]:
    """How many weights each parameter stands for, by its id."""
    found = {id(p): p.numel() for p in model.parameters()}
    for _, module in four_bit_modules(model):
        found |= {id(module.weight): module.in_features * module.out_features, id(module.absmax): 0}
    return found


def num_bytes_read(model: nn.Module) -> int:
    """Bytes of the model before anything was held in 4 bits."""
    more = (m.in_features * m.out_features * m.dtype.itemsize for _, m in four_bit_modules(model))
    bytes_in_four_bits = sum(m.weight.numel() + m.absmax.numel() for _, m in four_bit_modules(model))
    return sum(p.numel() * p.element_size() for p in model.parameters()) + sum(more) - bytes_in_four_bits


def describe(causal_lm: Any, kept: Sequence[str]) -> str:
    """What is held in 4 bits, and what is not, before adapters are put in; '' where nothing is."""
    held = [module for _, module in four_bit_modules(causal_lm)]
    if not held:
        return ""
    weights = sum(module.in_features * module.out_features for module in held)
    odd = sum(not _fits(linear) for _, linear in _linear(causal_lm, kept))
    also = f", {odd} as they are for rows of no multiple of {BLOCK} weights" if odd else ""
    experts = sum(p.numel() for p in causal_lm.parameters() if p.ndim == 3)
    more = f", and {experts:,} weights of experts that are held in one tensor" if experts else ""
    return f"; {len(held)} linear modules with {weights:,} weights in 4 bits{also}{more}"

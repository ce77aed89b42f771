"""Frozen linear modules in 4 bits: bitsandbytes' NF4, sharded along dim 0 like every other weight.

bitsandbytes' own module keeps the scales outside of its parameters, where sharding loses them. Here they are a
parameter too. A weight of shape (2, 128), for example: each row has two blocks of 64 weights. `weight` holds the 4-bit
codes, (2, 64) bytes; `absmax` holds one float32 per block as 4 bytes, (2, 8) bytes. Both have the rows of the weight,
so that a shard of rows is complete.

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
"""The number of weights of a row that share a scale: 4 bits each, and a float32 for all of them."""
ROUTERS = ("gate", "router")
"""Ends of the names of modules that choose experts. They are small, and a rounding error could change a choice."""
CPU = torch.device("cpu")


class FourBitLinear(nn.Linear):
    """A frozen linear module.

    `weight`: uint8 of shape (out features, in features / 2), two codes per byte. `absmax`: the scale of each block, a
    float32 as four bytes: uint8 of shape (out features, in features / 16). Bytes, because mixed precision casts floats.
    `dtype`: of the products.
    """

    def __init__(self, plain: nn.Linear, weight: Tensor, absmax: Tensor) -> None:
        # Not that of nn.Linear, which would allocate a full weight.
        nn.Module.__init__(self)
        self.in_features = plain.in_features
        self.out_features = plain.out_features
        self.dtype = plain.weight.dtype
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.absmax = nn.Parameter(absmax, requires_grad=False)
        self.bias = plain.bias

    def forward(self, input: Tensor) -> Tensor:
        """Multiply as the plain module would with the dequantised weight."""
        parts = (self.weight, self.absmax, self.bias, self.dtype)
        return cast(Tensor, _Product.apply(input, *parts))  # type: ignore[no-untyped-call]

    def dense(self) -> Tensor:
        """Return the weight that it multiplies with, (out features, in features), sharded as the codes are."""
        if not isinstance(self.weight, DTensor):
            return dequantised(self.weight, self.absmax, self.dtype)

        assert isinstance(self.absmax, DTensor), "both are sharded, or none"
        rows = dequantised(self.weight.to_local(), self.absmax.to_local(), self.dtype)
        # Without the shape, DTensor would assume shards of equal size.
        return DTensor.from_local(
            rows,
            self.weight.device_mesh,
            self.weight.placements,
            shape=torch.Size((self.out_features, self.in_features)),
            stride=(self.in_features, 1),
        )

    def plain(self, weight: Tensor) -> nn.Linear:
        """Return an ordinary module with this weight and the same bias, on the CPU, where the model was read to."""
        linear = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        linear.weight = nn.Parameter(weight.to(CPU), requires_grad=False)
        linear.bias = self.bias
        return linear


class _Product(torch.autograd.Function):
    """A product with a weight that is dequantised for it and freed after it; in the backward once more."""

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
    """Return the weights of these rows of codes."""
    shape = (codes.shape[0], 2 * codes.shape[1])
    # `plan` runs on fake tensors and needs no bitsandbytes; a rank may hold no row.
    if isinstance(codes, FakeTensor) or not codes.numel():
        return codes.new_empty(shape, dtype=dtype)

    scales = absmax.view(torch.float32).view(-1)
    return cast(Tensor, _operators().dequantize_4bit(codes.view(-1, 1), scales, BLOCK, "nf4", shape, dtype))


def _quantised(weight: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return codes and scales as a `FourBitLinear` holds them, on the device of `weight`. Computed on `device`."""
    rows, width = weight.shape
    if weight.is_meta:
        return (
            torch.empty(rows, width // 2, dtype=torch.uint8, device="meta"),
            torch.empty(rows, width // 16, dtype=torch.uint8, device="meta"),
        )

    codes, scales = _operators().quantize_4bit(weight.to(device), BLOCK, "nf4", torch.uint8)
    codes = codes.to(weight.device).view(rows, width // 2)
    scales = scales.to(weight.device).view(rows, width // BLOCK)
    return codes, scales.view(torch.uint8)


def _operators() -> Any:
    """Return bitsandbytes' operators. Raises: ConfigError when it is not installed."""
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
    """Raise a ConfigError when 4 bits are wanted, and a training on `device` cannot have them."""
    if config.load_in_4bit and device.type != "cuda":
        raise ConfigError(
            "model.load_in_4bit=true needs CUDA", found=f"the device {device.type}", fix="model.load_in_4bit=false"
        )
    if config.load_in_4bit:
        _operators()


def quantised(config: ModelConfig, causal_lm: Any, adapter: Any, device: torch.device = CPU) -> Any:
    """Quantise the linear modules of a model in place where `config` wants 4 bits; on meta without memory.

    They are quantised on `device` and stay where they were. `adapter`: PEFT's config, whose `modules_to_save` are not
    quantised.
    Raises: ModelError when no module can be quantised; ConfigError when bitsandbytes is not installed.
    """
    if not config.load_in_4bit:
        return causal_lm

    chosen = [(name, linear) for name, linear in _linear(causal_lm, adapter.modules_to_save or ()) if _fits(linear)]
    if not chosen:
        raise ModelError(
            f"model.load_in_4bit: {type(causal_lm).__name__} has no module that can be quantised",
            expected=f"linear modules outside of the head, with rows of a multiple of {BLOCK} weights",
            fix="model.load_in_4bit=false",
        )

    # Popped, so that each plain weight is freed before the next one is quantised.
    with torch.no_grad():
        while chosen:
            name, linear = chosen.pop()
            causal_lm.set_submodule(name, FourBitLinear(linear, *_quantised(linear.weight, device)))

    return causal_lm


def _linear(causal_lm: Any, kept: Sequence[str]) -> Iterator[tuple[str, nn.Linear]]:
    """Yield the linear modules that are no head, no router, and not in a module whose name ends in one of `kept`."""
    head = causal_lm.get_output_embeddings()
    for name, module in causal_lm.named_modules():
        above = accumulate(name.split("."), "{}.{}".format)
        plain = type(module) is nn.Linear and module is not head and not name.endswith(ROUTERS)
        if plain and not any(part.endswith(tuple(kept)) for part in above):
            yield name, module


def _fits(linear: nn.Linear) -> bool:
    return linear.in_features % BLOCK == 0


def four_bit_modules(model: nn.Module) -> list[tuple[str, FourBitLinear]]:
    """List the modules in 4 bits with their names."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, FourBitLinear)]


def num_weights(model: nn.Module) -> dict[int, int]:
    """Return the number of weights that each parameter represents, by its id: two for each byte of 4-bit codes."""
    found = {id(p): p.numel() for p in model.parameters()}
    for _, module in four_bit_modules(model):
        found[id(module.weight)] = module.in_features * module.out_features
        found[id(module.absmax)] = 0
    return found


def num_bytes_read(model: nn.Module) -> int:
    """Return the bytes of the model before any module was quantised."""
    total = sum(p.numel() * p.element_size() for p in model.parameters())
    for _, module in four_bit_modules(model):
        total += module.in_features * module.out_features * module.dtype.itemsize
        total -= module.weight.numel() + module.absmax.numel()
    return total


def describe(causal_lm: Any, kept: Sequence[str]) -> str:
    """Describe what is in 4 bits and what is not, before adapters are injected; '' where nothing is."""
    held = [module for _, module in four_bit_modules(causal_lm)]
    if not held:
        return ""

    weights = sum(module.in_features * module.out_features for module in held)
    text = f"; {len(held)} linear modules with {weights:,} weights in 4 bits"

    odd = [linear for _, linear in _linear(causal_lm, kept) if not _fits(linear)]
    if odd:
        text += f"; {len(odd)} linear modules not, since their rows are no multiple of {BLOCK} weights"

    experts = sum(p.numel() for p in causal_lm.parameters() if p.ndim == 3)
    if experts:
        text += f"; {experts:,} weights of fused experts not"

    return text

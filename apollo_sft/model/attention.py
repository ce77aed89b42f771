"""Causal attention over packed documents, passed to transformers by its own AttentionInterface.

Every kernel has one signature: query (tokens, heads, head dim), key and value (tokens, kv heads, head dim), and a
`Documents` with the place where each document begins. No document sees another. Two documents of 2 and 3 tokens, for
example, have starts [0, 2, 5], and query (row) i sees key (column) j where there is a 1:

    1 0 0 0 0
    1 1 0 0 0
    0 0 1 0 0
    0 0 1 1 0
    0 0 1 1 1
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from apollo_sft.errors import ConfigError, ModelError

NAME = "apollo_packed"
"""The name under which the attention function is registered with transformers."""


class HeadExchange(Protocol):
    """Sequence parallelism's part in attention: from a slice of the tokens with all heads to all tokens with some."""

    def to_heads(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Exchange: (1, heads, tokens / sp, head dim) each -> (1, heads / sp, tokens, head dim)."""

    def to_tokens(self, output: Tensor, num_heads: int) -> Tensor:
        """Exchange back, for a model of `num_heads` heads."""

    def my_heads(self, per_head: Tensor) -> Tensor:
        """Select, of (heads,), the values of the heads that this rank attends with."""


@dataclass(frozen=True, slots=True)
class Documents:
    """The documents of one row."""

    starts: Tensor
    """int32, (documents + 1,), on the device of the tokens: the first position of each document, and the total."""
    longest: int
    """Tokens of the longest document."""


@dataclass(frozen=True, slots=True)
class AttentionOptions:
    """What the model passes to the attention function beside query, key and value."""

    scaling: float | None
    dropout: float
    window: int | None
    """The number of tokens that a position sees, itself included; None is all."""
    softcap: float | None
    sinks: Tensor | None

    @property
    def plain(self) -> bool:
        """Return whether no score is changed beyond scaling and masking."""
        return self.softcap is None and self.sinks is None


Kernel = Callable[[Tensor, Tensor, Tensor, Documents, AttentionOptions], Tensor]


def sdpa_kernel(query: Tensor, key: Tensor, value: Tensor, documents: Documents, options: AttentionOptions) -> Tensor:
    """Attend in one document at a time: exact on any device and in any dtype, the reference of every other kernel."""
    return one_by_one(query, key, value, torch.diff(documents.starts).tolist(), options)


def one_by_one(query: Tensor, key: Tensor, value: Tensor, lengths: list[int], options: AttentionOptions) -> Tensor:
    """Attend as `sdpa_kernel`, where the lengths of the documents are known already."""
    queries = torch.split(query.transpose(0, 1)[None], lengths, dim=2)
    keys = torch.split(key.transpose(0, 1)[None], lengths, dim=2)
    values = torch.split(value.transpose(0, 1)[None], lengths, dim=2)

    attend = _sdpa if options.plain else _scores
    outputs = [attend(q, k, v, options) for q, k, v in zip(queries, keys, values, strict=True)]
    return torch.cat(outputs, dim=2)[0].transpose(0, 1)


def _sdpa(query: Tensor, key: Tensor, value: Tensor, options: AttentionOptions) -> Tensor:
    # A mask only where the window hides something: without one, faster kernels serve.
    tokens = query.shape[2]
    mask = None
    if options.window is not None and options.window < tokens:
        mask = _visible(tokens, options.window, query.device)

    return nn.functional.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        dropout_p=options.dropout,
        is_causal=mask is None,
        scale=options.scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )


def _scores(query: Tensor, key: Tensor, value: Tensor, options: AttentionOptions) -> Tensor:
    """Attend with explicit scores, for models that cap them (Gemma 2) or add a sink to each head (gpt-oss)."""
    groups = query.shape[1] // key.shape[1]
    key = key.repeat_interleave(groups, dim=1)
    value = value.repeat_interleave(groups, dim=1)

    scaling = query.shape[-1] ** -0.5 if options.scaling is None else options.scaling
    scores = (query @ key.transpose(2, 3)) * scaling
    if options.softcap is not None:
        scores = options.softcap * torch.tanh(scores / options.softcap)

    tokens = query.shape[2]
    scores = scores.masked_fill(~_visible(tokens, options.window or tokens, query.device), float("-inf"))

    # A sink takes a share of the softmax and has no value: its column is cut off after it.
    if options.sinks is not None:
        sinks = options.sinks.reshape(1, -1, 1, 1).expand(scores.shape[0], -1, tokens, 1)
        scores = torch.cat([scores, sinks.to(scores.dtype)], dim=-1)

    weights = torch.softmax(scores, dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32))[..., :tokens]
    return nn.functional.dropout(weights.to(value.dtype), options.dropout) @ value


def _visible(tokens: int, window: int, device: torch.device) -> Tensor:
    """Return (tokens, tokens), True where a query (row) sees a key (column)."""
    position = torch.arange(tokens, device=device)
    distance = position[:, None] - position[None, :]
    return (distance >= 0) & (distance < window)


def varlen_kernel(query: Tensor, key: Tensor, value: Tensor, documents: Documents, options: AttentionOptions) -> Tensor:
    """Attend by torch's own variable-length FlashAttention: CUDA, fp16 or bf16, no dropout; else by `sdpa_kernel`."""
    if not options.plain or options.dropout or query.dtype not in (torch.float16, torch.bfloat16):
        return sdpa_kernel(query, key, value, documents, options)

    from torch.nn.attention.varlen import varlen_attn

    starts = documents.starts
    longest = documents.longest
    # (tokens to the left, tokens to the right) of a position, without itself; -1 is all.
    window = (-1, 0) if options.window is None else (options.window - 1, 0)
    gqa = query.shape[1] != key.shape[1]
    output = varlen_attn(
        query, key, value, starts, starts, longest, longest, scale=options.scaling, window_size=window, enable_gqa=gqa
    )
    return cast(Tensor, output)


def flash_kernel(query: Tensor, key: Tensor, value: Tensor, documents: Documents, options: AttentionOptions) -> Tensor:
    """Attend by the flash-attn package: CUDA, fp16 or bf16, no sinks; else by `sdpa_kernel`."""
    if options.sinks is not None or query.dtype not in (torch.float16, torch.bfloat16):
        return sdpa_kernel(query, key, value, documents, options)

    from flash_attn import flash_attn_varlen_func

    starts = documents.starts
    longest = documents.longest
    output: Tensor = flash_attn_varlen_func(
        query,
        key,
        value,
        cu_seqlens_q=starts,
        cu_seqlens_k=starts,
        max_seqlen_q=longest,
        max_seqlen_k=longest,
        dropout_p=options.dropout,
        softmax_scale=options.scaling,
        causal=True,
        window_size=(-1, -1) if options.window is None else (options.window - 1, 0),
        softcap=options.softcap or 0.0,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )
    return output


def choose_kernel(wanted: str, device: torch.device) -> tuple[Kernel, str]:
    """Return the kernel for `model.attn_implementation`, and a sentence about the choice for the log.

    Raises: ConfigError when the wanted kernel cannot run here.
    """
    has_flash = importlib.util.find_spec("flash_attn") is not None
    if wanted in ("flash", "varlen") and device.type != "cuda":
        raise ConfigError(
            "model.attn_implementation needs a CUDA device",
            found=f"{wanted} on {device.type}",
            expected="auto or sdpa without CUDA",
            fix="model.attn_implementation=auto",
        )
    if wanted == "flash" and not has_flash:
        raise ConfigError(
            "model.attn_implementation=flash needs the package flash-attn, which is not installed",
            fix="pip install flash-attn, or model.attn_implementation=auto",
        )

    if wanted == "sdpa" or device.type != "cuda":
        return sdpa_kernel, "attention: SDPA, one document at a time"
    if wanted == "flash" or (wanted == "auto" and has_flash):
        return flash_kernel, "attention: flash-attn, variable length"
    return varlen_kernel, "attention: torch.nn.attention.varlen (flash-attn is not installed or not wanted)"


def register(kernel: Kernel, exchange: HeadExchange | None = None) -> None:
    """Register an attention function with transformers under `NAME` that uses `kernel`.

    transformers makes no mask for it, since no mask function has that name.
    `exchange` is None when one rank holds all tokens of its documents.
    """
    from transformers import AttentionInterface

    def attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        document_starts: Tensor | None = None,
        longest_document: int = 0,
        scaling: float | None = None,
        dropout: float = 0.0,
        sliding_window: int | None = None,
        softcap: float | None = None,
        s_aux: Tensor | None = None,
        **more: Any,
    ) -> tuple[Tensor, None]:
        if document_starts is None:
            raise ModelError(f"{type(module).__name__} does not receive the document starts from the layers above it")

        _check_call(module, {"attention_mask": attention_mask, **more})

        num_heads = query.shape[1]
        if exchange is not None:
            if s_aux is not None:
                s_aux = exchange.my_heads(s_aux)
            query, key, value = exchange.to_heads(query, key, value)

        # transformers passes (1, heads, tokens, head dim), a kernel takes (tokens, heads, head dim).
        options = AttentionOptions(scaling, dropout if module.training else 0.0, sliding_window, softcap, s_aux)
        documents = Documents(document_starts, longest_document)
        q, k, v = (states[0].transpose(0, 1) for states in (query, key, value))
        output = kernel(q, k, v, documents, options)

        if exchange is not None:
            output = exchange.to_tokens(output.transpose(0, 1)[None], num_heads)[0].transpose(0, 1)

        return output[None].contiguous(), None  # some architectures take a view of it

    AttentionInterface.register(NAME, attention)


def _check_call(module: nn.Module, more: dict[str, Any]) -> None:
    """Raise a ModelError when the caller needs scores that the kernels do not compute."""
    found = [name for name in ("attention_mask", "position_bias") if more.get(name) is not None]

    # As transformers' own functions do: the argument, if there is one, before the attribute.
    is_causal = more.get("is_causal")
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)

    if not is_causal:
        found.append("is_causal=False")

    if found:
        raise ModelError(
            f"{type(module).__name__} cannot be trained exactly here: it needs more than causal attention in a window",
            found=", ".join(found),
        )


@dataclass(frozen=True, slots=True)
class Windows:
    """Sliding windows of a model, in tokens."""

    masked: set[int] = field(default_factory=set)
    """Those of the masks that the model requested."""
    attended: set[int] = field(default_factory=set)
    """Those that it passed to the attention function."""


@contextmanager
def watch_windows() -> Iterator[Windows]:
    """Record the windows of the forwards inside the context: a model may limit its view by the mask alone.

    A mask function is registered for that, which makes no mask. Outside of the context there is none: before it called
    one, transformers would check whether documents are packed, and every forward would wait for the GPU.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    windows = Windows()
    attend = ALL_ATTENTION_FUNCTIONS[NAME]

    def watched_attention(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("sliding_window") is not None:
            windows.attended.add(kwargs["sliding_window"])
        return attend(*args, **kwargs)

    def no_mask(*_: Any, **kwargs: Any) -> None:
        if kwargs.get("local_size") is not None:
            windows.masked.add(kwargs["local_size"])

    AttentionInterface.register(NAME, watched_attention)
    AttentionMaskInterface.register(NAME, no_mask)
    try:
        yield windows
    finally:
        AttentionInterface.register(NAME, attend)
        del AttentionMaskInterface._global_mapping[NAME]

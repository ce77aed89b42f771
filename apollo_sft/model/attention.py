"""Causal attention over packed documents, handed to transformers by its own AttentionInterface.

Every kernel has one signature: query (tokens, heads, head dim), key and value (tokens, kv heads, head dim), and a
`Documents` that says where each document begins. No document sees another.
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
        """(1, heads, tokens / sp, head dim) each -> (1, heads / sp, tokens, head dim)."""

    def to_tokens(self, output: Tensor, num_heads: int) -> Tensor:
        """The reverse, for the `num_heads` heads that there are."""

    def my_heads(self, per_head: Tensor) -> Tensor:
        """(heads,) -> the values of the heads that this rank attends with."""


@dataclass(frozen=True, slots=True)
class Documents:
    """`starts`: int32, (documents + 1,), on the device of the tokens. `longest`: tokens of the longest document."""

    starts: Tensor
    longest: int


@dataclass(frozen=True, slots=True)
class AttentionOptions:
    """What the model asks of one call. `window`: how many tokens a position sees, itself included; None is all."""

    scaling: float | None
    dropout: float
    window: int | None
    softcap: float | None
    sinks: Tensor | None

    @property
    def plain(self) -> bool:
        """True when no score is changed beyond scaling and masking."""
        return self.softcap is None and self.sinks is None


Kernel = Callable[[Tensor, Tensor, Tensor, Documents, AttentionOptions], Tensor]


def sdpa_kernel(query: Tensor, key: Tensor, value: Tensor, documents: Documents, options: AttentionOptions) -> Tensor:
    """One document at a time: exact on any device and in any dtype, and the reference of every other kernel."""
    return one_by_one(query, key, value, torch.diff(documents.starts).tolist(), options)


def one_by_one(query: Tensor, key: Tensor, value: Tensor, lengths: list[int], options: AttentionOptions) -> Tensor:
    """The same, where the lengths of the documents are known already."""
    parts = (torch.split(part.transpose(0, 1)[None], lengths, dim=2) for part in (query, key, value))
    attend = _sdpa if options.plain else _scores
    outputs = [attend(q, k, v, options) for q, k, v in zip(*parts, strict=True)]
    return torch.cat(outputs, dim=2)[0].transpose(0, 1)


def _sdpa(query: Tensor, key: Tensor, value: Tensor, options: AttentionOptions) -> Tensor:
    tokens = query.shape[2]
    window = options.window if options.window is not None and options.window < tokens else None
    return nn.functional.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=None if window is None else _visible(tokens, window, query.device),
        dropout_p=options.dropout,
        is_causal=window is None,
        scale=options.scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )


def _scores(query: Tensor, key: Tensor, value: Tensor, options: AttentionOptions) -> Tensor:
    """Attention written out, for models that cap their scores (Gemma 2) or add a sink to each head (gpt-oss)."""
    groups = query.shape[1] // key.shape[1]
    key, value = (states.repeat_interleave(groups, dim=1) for states in (key, value))
    scaling = query.shape[-1] ** -0.5 if options.scaling is None else options.scaling
    scores = (query @ key.transpose(2, 3)) * scaling
    if options.softcap is not None:
        scores = options.softcap * torch.tanh(scores / options.softcap)
    tokens = query.shape[2]
    scores = scores.masked_fill(~_visible(tokens, options.window or tokens, query.device), float("-inf"))
    if options.sinks is not None:
        sinks = options.sinks.reshape(1, -1, 1, 1).expand(scores.shape[0], -1, tokens, 1)
        scores = torch.cat([scores, sinks.to(scores.dtype)], dim=-1)
    weights = torch.softmax(scores, dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32))[..., :tokens]
    return nn.functional.dropout(weights.to(value.dtype), options.dropout) @ value


def _visible(tokens: int, window: int, device: torch.device) -> Tensor:
    """(tokens, tokens), True where a query (row) sees a key (column)."""
    position = torch.arange(tokens, device=device)
    distance = position[:, None] - position[None, :]
    return (distance >= 0) & (distance < window)


def varlen_kernel(query: Tensor, key: Tensor, value: Tensor, documents: Documents, options: AttentionOptions) -> Tensor:
    """torch's own variable-length FlashAttention. CUDA, fp16 or bf16, no dropout; the rest goes to `sdpa_kernel`."""
    if not options.plain or options.dropout or query.dtype not in (torch.float16, torch.bfloat16):
        return sdpa_kernel(query, key, value, documents, options)
    from torch.nn.attention.varlen import varlen_attn

    starts, longest = documents.starts, documents.longest
    window = (-1, 0) if options.window is None else (options.window - 1, 0)
    gqa = query.shape[1] != key.shape[1]
    output = varlen_attn(
        query, key, value, starts, starts, longest, longest, scale=options.scaling, window_size=window, enable_gqa=gqa
    )
    return cast(Tensor, output)


def flash_kernel(query: Tensor, key: Tensor, value: Tensor, documents: Documents, options: AttentionOptions) -> Tensor:
    """The flash-attn package. CUDA, fp16 or bf16, no sinks; the rest goes to `sdpa_kernel`."""
    if options.sinks is not None or query.dtype not in (torch.float16, torch.bfloat16):
        return sdpa_kernel(query, key, value, documents, options)
    from flash_attn import flash_attn_varlen_func

    starts, longest = documents.starts, documents.longest
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
    """The kernel for `model.attn_implementation` and one sentence that says which and why.

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
    """Make `NAME` known to transformers as an attention function that uses `kernel`. It makes no mask where it knows no
    mask function of that name.

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
            raise ModelError(f"{type(module).__name__} is not handed the document starts by the layers above it")
        _check_call(module, {"attention_mask": attention_mask, **more})
        if exchange is not None:
            s_aux = None if s_aux is None else exchange.my_heads(s_aux)
            num_heads = query.shape[1]
            query, key, value = exchange.to_heads(query, key, value)
        options = AttentionOptions(scaling, dropout if module.training else 0.0, sliding_window, softcap, s_aux)
        q, k, v = (states[0].transpose(0, 1) for states in (query, key, value))
        output = kernel(q, k, v, Documents(document_starts, longest_document), options)
        if exchange is not None:
            output = exchange.to_tokens(output.transpose(0, 1)[None], num_heads)[0].transpose(0, 1)
        return output[None].contiguous(), None  # some architectures take a view of it

    AttentionInterface.register(NAME, attention)


def _check_call(module: nn.Module, more: dict[str, Any]) -> None:
    """Raises: ModelError when the caller wants scores that the kernels do not form."""
    found = [name for name in ("attention_mask", "position_bias") if more.get(name) is not None]
    is_causal = more.get("is_causal")
    if not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        found.append("is_causal=False")
    if found:
        raise ModelError(
            f"{type(module).__name__} cannot be trained exactly here: it wants more than causal attention in a window",
            found=", ".join(found),
        )


@dataclass(frozen=True, slots=True)
class Windows:
    """Sliding windows in tokens: those of the masks that a model asked for, those it told the attention function."""

    masked: set[int] = field(default_factory=set)
    attended: set[int] = field(default_factory=set)


@contextmanager
def watch_windows() -> Iterator[Windows]:
    """Note the windows of the forwards inside. A model that limits its view by the mask alone shows here.

    For that masks are asked for, of which none is made. Outside of this no mask function has the name: before it asked
    for one, transformers would look whether documents are packed, and every forward would wait for a GPU.
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

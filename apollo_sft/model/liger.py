"""Liger's kernels instead of transformers' norms, gated products and rotary embedding, on CUDA.

Source: Liger Kernel, arXiv:2410.10989. Our own head is kept: it runs at targets only, which Liger's does not.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from apollo_sft.config.schema import ModelConfig
from apollo_sft.errors import ConfigError

DENSE = ("rms_norm", "rope", "swiglu", "geglu")
FAMILIES = {
    "exaone4": DENSE,
    "gemma": DENSE,
    "gemma2": DENSE,
    "gemma3_text": DENSE,
    "glm4": ("rms_norm", "swiglu"),
    "gpt_oss": ("rms_norm", "rope"),
    "granite": DENSE,
    "hunyuan_v1_dense": DENSE,
    "llama": DENSE,
    "mistral": DENSE,
    "mixtral": ("rms_norm", "rope"),
    "olmo2": DENSE,
    "olmo3": DENSE,
    "phi3": DENSE,
    "qwen2": DENSE,
    "qwen3": DENSE,
    "qwen3_moe": ("rms_norm", "rope"),
    "smollm3": DENSE,
}
"""The kernels by `model_type`, for architectures whose gradients a test compares with those without the kernels.

Experts are not replaced: transformers computes them grouped."""

ROPE = "apply_rotary_pos_emb"


def check(model: ModelConfig, device: torch.device) -> None:
    """Raise a ConfigError where `model.use_liger` is set and the kernels cannot run."""
    if not model.use_liger:
        return

    without = "model.use_liger=false"
    if device.type != "cuda":
        raise ConfigError("model.use_liger=true: Liger's kernels run on CUDA only", found=device.type, fix=without)
    if model.fsdp_config.model_dtype == "fp64":
        raise ConfigError(
            "model.use_liger=true: Liger's kernels compute in float32",
            found="model.fsdp_config.model_dtype=fp64",
            fix=without,
        )
    if model.compile:
        raise ConfigError(
            "model.use_liger=true and model.compile=true cannot be used together: both replace the same operations",
            expected="one of them",
            fix=f"{without}, or model.compile=false",
        )
    if importlib.util.find_spec("liger_kernel") is None:
        raise ConfigError(
            "model.use_liger=true: Liger's kernels are not installed",
            fix=f"pip install 'apollo-sft[liger]', or {without}",
        )


def check_family(model: ModelConfig, model_type: str) -> None:
    """Raise a ConfigError where `model.use_liger` is set and no test has shown that the kernels are right."""
    if model.use_liger and model_type not in FAMILIES:
        raise ConfigError(
            "model.use_liger=true: Liger's kernels are not proven for this architecture",
            found=f"model_type {model_type}",
            expected=f"one of {', '.join(FAMILIES)}",
            fix="model.use_liger=false",
        )


def apply(causal_lm: Any) -> None:
    """Replace the operations of this model, of one of `FAMILIES`. Other models of the process are not changed."""
    from liger_kernel.transformers.monkey_patch import _apply_liger_kernel_to_instance

    chosen = FAMILIES[causal_lm.config.model_type]
    kernels = {name: name in chosen for name in DENSE}

    # Liger also writes its classes into the Python module of the architecture, for models that are built later: that
    # is undone.
    module = vars(sys.modules[type(causal_lm).__module__])
    before = dict(module)
    _apply_liger_kernel_to_instance(causal_lm, cross_entropy=False, fused_linear_cross_entropy=False, **kernels)
    fast = module[ROPE]
    module.update(before)

    # The rotary embedding is a function of that module, which all models share: Liger's serves tensors on CUDA only.
    if fast is not before[ROPE] and not hasattr(before[ROPE], "elsewhere"):
        module[ROPE] = _by_device(fast, before[ROPE])


def _by_device(on_cuda: Callable[..., Any], elsewhere: Callable[..., Any]) -> Callable[..., Any]:
    def rotate(q: Tensor, *others: Any, **options: Any) -> Any:
        function = on_cuda if q.is_cuda else elsewhere
        return function(q, *others, **options)

    rotate.on_cuda = on_cuda  # type: ignore[attr-defined]
    rotate.elsewhere = elsewhere  # type: ignore[attr-defined]
    return rotate

"""A saved adapter in PEFT's own format: read adapter_config.json, check and load the weights, name what is written.

PEFT's file names a tensor as the model does, without the name of the adapter and below `base_model.model`:

    in the model    layers.0.q_proj.lora_A.default.weight
    in the file     base_model.model.layers.0.q_proj.lora_A.weight
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from apollo_sft.config.schema import ModelConfig
from apollo_sft.errors import ConfigError, ModelError
from apollo_sft.model import lora_targets

ADAPTER = "default"
"""The name of the adapter in the model."""
ADAPTER_FILE = "adapter_model.safetensors"
BASE_WEIGHT = ".base_layer.weight"
TAKEN = (
    "r", "lora_alpha", "target_modules", "exclude_modules", "lora_dropout", "fan_in_fan_out", "bias", "use_rslora",
    "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern", "task_type", "base_model_name_or_path",
    "use_dora", "modules_to_save", "target_parameters",
)  # fmt: skip
"""Settings of a saved adapter that are used."""
IGNORED = (
    "peft_type", "peft_version", "auto_mapping", "revision", "inference_mode", "init_lora_weights",
    "ensure_weight_tying",
)  # fmt: skip
"""Settings that do not change what the adapter computes."""


def read_config(model: ModelConfig, path: str) -> Any:
    """Read PEFT's config of the adapter that is continued. Other settings than `TAKEN` may name modules to import.

    Raises: ConfigError when the folder holds no plain LoRA adapter, or when other keys contradict it.
    """
    from peft import LoraConfig

    raw = _read_json(path)
    plain = LoraConfig().to_dict()
    odd = []
    for key in sorted(raw.keys() - {*TAKEN, *IGNORED}):
        if raw[key] not in (plain.get(key), None, False, {}, []):
            odd.append(key)

    if raw.get("peft_type") != "LORA" or odd:
        shown = "".join(f", {key}={str(raw[key])[:80]}" for key in odd[:3])
        raise ConfigError(
            "model.lora_adapter_path is not a plain LoRA adapter",
            found=f"{path}: {raw.get('peft_type')}{shown}",
            expected="LoRA, perhaps with rsLoRA, DoRA and modules_to_save, and no other addition",
        )

    try:
        saved = LoraConfig(**{key: raw[key] for key in TAKEN if raw.get(key) is not None})
        if not isinstance(saved.r, int) or not isinstance(saved.lora_alpha, int | float):
            raise TypeError("r and lora_alpha must be numbers")
    except Exception as error:  # a file of others in a library: it may raise anything
        found = f"{path}: {type(error).__name__}: {error}"
        raise ConfigError("model.lora_adapter_path holds settings that PEFT cannot use", found=found) from error

    if model.lora_rank not in (0, saved.r):
        raise ConfigError(
            "model.lora_rank is not that of the adapter that is continued",
            found=f"{model.lora_rank}, and {saved.r} in {path}",
            fix=f"model.lora_rank={saved.r}, or leave it out",
        )

    _check_exclusions(model, saved.exclude_modules, path)
    setattr(saved, lora_targets.CONTINUED, True)
    return saved


def _check_exclusions(model: ModelConfig, saved: Any, path: str) -> None:
    """Raise a ConfigError when the key excludes other modules than the adapter that is continued."""
    asked = model.exclude_modules
    if not asked:
        return

    if isinstance(asked, str):
        same = asked == saved
        shown = asked
    else:
        same = set(asked) == saved
        shown = ", ".join(asked)

    if not same:
        held = saved if isinstance(saved, str) else ", ".join(sorted(saved or ()))
        raise ConfigError(
            "model.exclude_modules is not that of the adapter that is continued",
            found=f"{shown}, and {held or 'none'} in {path}",
            fix="leave it out: the adapter has its own",
        )


def _read_json(path: str) -> dict[str, Any]:
    try:
        raw = json.loads((Path(path) / "adapter_config.json").read_text(encoding="utf-8"))
        if not isinstance(raw, dict):
            raise ValueError("adapter_config.json is no JSON object")
    except (ValueError, OSError, RecursionError) as error:
        raise ConfigError(
            "model.lora_adapter_path is no adapter folder",
            found=f"{path}: {str(error).splitlines()[0]}",
            expected="a folder with adapter_config.json and adapter_model.safetensors",
        ) from error
    return raw


def fill(causal_lm: Any, path: str) -> None:
    """Load the trained parameters from an adapter folder. Raises: ModelError when the file does not fit the model."""
    from safetensors.torch import load_file

    check_adapter_file(causal_lm, path)
    saved = load_file(Path(path) / ADAPTER_FILE)
    with torch.no_grad():
        for in_file, _, parameter in trained(causal_lm):
            parameter.copy_(saved.pop(in_file))

    # What is left are copies of frozen weights of the base: they show whether the adapter belongs to this base.
    frozen = {_file_name(name): p for name, p in causal_lm.named_parameters(remove_duplicate=False)}
    for in_file, copied in saved.items():
        if not torch.equal(copied.to(frozen[in_file].dtype), frozen[in_file]):
            raise ModelError(
                f"{Path(path) / ADAPTER_FILE} holds other base weights than the model",
                found=in_file,
                fix="the base that the adapter was trained on",
            )


def check_adapter_file(causal_lm: Any, path: str) -> None:
    """Check that the adapter in the folder `path` fits the adapters of a model, which may be on meta.

    Raises: ModelError.
    """
    from safetensors import SafetensorError, safe_open

    file = Path(path) / ADAPTER_FILE
    if not file.is_file():
        raise ModelError(f"{path} holds no {ADAPTER_FILE}", expected="safetensors; pickles are not read")

    try:
        with safe_open(file, "pt") as opened:
            held = {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{file} is no complete safetensors file", found=error) from error

    # PEFT copies the base weight of an adapted embedding or head into the file.
    wanted = {in_file: tuple(p.shape) for in_file, _, p in trained(causal_lm)}
    frozen = {_file_name(name): tuple(p.shape) for name, p in causal_lm.named_parameters(remove_duplicate=False)}
    wanted |= {name: shape for name, shape in frozen.items() if name in held and name.endswith(BASE_WEIGHT)}

    if held.keys() != wanted.keys():
        odd = sorted(held.keys() ^ wanted.keys())
        raise ModelError(f"{file} does not fit this model", found=f"{len(odd)} names differ: {', '.join(odd[:3])}")

    for name, shape in wanted.items():
        if held[name] != shape:
            what = f"{file} is the adapter of another model: {name}"
            raise ModelError(what, found=f"shape {held[name]}", expected=f"shape {shape}")


def trained(causal_lm: Any) -> Iterator[tuple[str, str, nn.Parameter]]:
    """Yield every trained parameter: its name in PEFT's file, its first name in the model, itself. Tied ones twice."""
    first = {id(p): name for name, p in causal_lm.named_parameters()}
    for name, parameter in causal_lm.named_parameters(remove_duplicate=False):
        if parameter.requires_grad:
            yield _file_name(name), first[id(parameter)], parameter


def trained_whole(causal_lm: Any) -> list[str]:
    """List the modules whose own parameters are trained, not adapters of them. Tied weights count under each name."""
    owners = set()
    for name, parameter in causal_lm.named_parameters(remove_duplicate=False):
        if parameter.requires_grad and f".{ADAPTER}." not in f"{name}.":
            owners.add(name.rpartition(".")[0])
    return sorted(owners)


def adapter_tensors(causal_lm: Any) -> dict[str, Tensor]:
    """Return the trained parameters, sharded or not, under the names of PEFT's own files."""
    return {in_file: p.detach() for in_file, _, p in trained(causal_lm)}


def saved_config(causal_lm: Any) -> Any:
    """Return PEFT's config for the files of the adapter, with the full names of the modules that are trained whole."""
    written = copy.copy(causal_lm.peft_config[ADAPTER])
    # Sorted, since the order of a set is another one in every process.
    for name in ("target_modules", "target_parameters", "exclude_modules"):
        names = getattr(written, name)
        if isinstance(names, set):
            setattr(written, name, sorted(names))

    written.modules_to_save = trained_whole(causal_lm) or None
    return written


def _file_name(name: str) -> str:
    plain = name.replace(f".{ADAPTER}.", ".").removesuffix(f".{ADAPTER}")
    if plain.endswith(".lora_magnitude_vector.weight"):
        plain = plain.removesuffix(".weight")
    return f"base_model.model.{plain}"

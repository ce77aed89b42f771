"""LoRA by PEFT, applied from outside: inject, and at the end merge, shard by shard.

Source: LoRA, arXiv:2106.09685.
"""

from __future__ import annotations

import copy
import json
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate

from apollo_sft.config.schema import ModelConfig
from apollo_sft.errors import ConfigError, ModelError
from apollo_sft.model import experts, lora_targets
from apollo_sft.model.four_bit import FourBitLinear, describe, four_bit_modules, num_weights
from apollo_sft.model.lora_targets import Adapted

ADAPTER = "default"
ADAPTER_FILE = "adapter_model.safetensors"
BASE_WEIGHT = ".base_layer.weight"
TAKEN = (
    "r", "lora_alpha", "target_modules", "exclude_modules", "lora_dropout", "fan_in_fan_out", "bias", "use_rslora",
    "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern", "task_type", "base_model_name_or_path",
    "use_dora", "modules_to_save", "target_parameters",
)  # fmt: skip
"""Settings of a saved adapter that are followed."""
IGNORED = (
    "peft_type", "peft_version", "auto_mapping", "revision", "inference_mode", "init_lora_weights",
    "ensure_weight_tying",
)  # fmt: skip
"""Those that say nothing about what the adapter computes."""


def lora_config(model: ModelConfig, source: str) -> Any | None:
    """PEFT's config of what `model` asks for, or of the adapter that is continued; None without LoRA.

    Raises: ConfigError when `lora_adapter_path` is no LoRA adapter, or other keys contradict it.
    """
    if model.lora_adapter_path is None and model.lora_rank == 0:
        return None
    continued = model.lora_adapter_path is not None
    config = _saved_config(model, str(model.lora_adapter_path)) if continued else _new_config(model, source)
    if config.use_dora and model.fsdp_config.wrap_policy.min_num_params:
        raise ConfigError(
            "DoRA reads the weights of a linear module from outside, so these cannot be a group of their own",
            found="model.fsdp_config.wrap_policy.min_num_params, which groups by size",
            fix="model.fsdp_config.wrap_policy.min_num_params=0",
        )
    if config.use_dora and model.load_in_4bit:
        raise ConfigError(
            "DoRA reads the weights of a linear module from outside, so these cannot be held in 4 bits",
            found="model.load_in_4bit=true",
            fix="model.use_dora=false, or model.load_in_4bit=false",
        )
    return config


def _new_config(model: ModelConfig, source: str) -> Any:
    from peft import LoraConfig

    targets, excluded = model.target_modules, model.exclude_modules
    return LoraConfig(
        r=model.lora_rank,
        lora_alpha=model.lora_alpha,
        target_modules=targets if isinstance(targets, str) else list(targets),
        target_parameters=list(model.target_parameters) or None,
        exclude_modules=excluded if isinstance(excluded, str) else list(excluded) or None,
        lora_dropout=model.lora_dropout,
        use_rslora=model.use_rslora,
        use_dora=model.use_dora,
        modules_to_save=list(model.modules_to_save) or None,
        bias="none",
        task_type="CAUSAL_LM",
        base_model_name_or_path=source,
    )


def _saved_config(model: ModelConfig, path: str) -> Any:
    """Of what the file says only what a plain LoRA adapter needs: other settings may name modules to import."""
    from peft import LoraConfig

    raw = _read_adapter_json(path)
    plain = LoraConfig().to_dict()
    odd = sorted(
        key
        for key, value in raw.items()
        if key not in (*TAKEN, *IGNORED) and value not in (plain.get(key), None, False, {}, [])
    )
    if raw.get("peft_type") != "LORA" or odd:
        raise ConfigError(
            "model.lora_adapter_path is not a plain LoRA adapter",
            found=f"{path}: {raw.get('peft_type')}" + "".join(f", {key}={str(raw[key])[:80]}" for key in odd[:3]),
            expected="LoRA, perhaps with rsLoRA, DoRA and modules_to_save, and no other addition",
        )
    try:
        saved = LoraConfig(**{key: raw[key] for key in TAKEN if raw.get(key) is not None})
        if not isinstance(saved.r, int) or not isinstance(saved.lora_alpha, int | float):
            raise TypeError("r and lora_alpha must be numbers")
    except Exception as error:  # a foreign file in a library: it may raise anything
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
    """Raises: ConfigError when the key asks for others than the adapter that is continued has."""
    asked = model.exclude_modules
    if asked and (asked if isinstance(asked, str) else set(asked)) != saved:
        held = saved if isinstance(saved, str) else ", ".join(sorted(saved or ()))
        raise ConfigError(
            "model.exclude_modules is not that of the adapter that is continued",
            found=f"{asked if isinstance(asked, str) else ', '.join(asked)}, and {held or 'none'} in {path}",
            fix="leave it out: what is adapted is the adapter's",
        )


def _read_adapter_json(path: str) -> dict[str, Any]:
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


def inject(causal_lm: Any, config: Any, master: torch.dtype, adapter_path: str | None = None) -> Adapted:
    """Freeze the model and add adapters in `master` dtype, in place; on meta they are without memory too.

    `config.modules_to_save` are trained as they are, in `master` dtype too. PEFT would train a copy of each.
    `adapter_path`: fill what is trained from this folder (on a rank that holds weights).
    Raises: ConfigError when a key names modules that are not there or cannot be adapted so; ModelError for an adapter
    that does not fit.
    """
    from peft import inject_adapter_in_model

    on_meta = next(causal_lm.parameters()).is_meta
    causal_lm.requires_grad_(False)
    in_four_bits = describe(causal_lm, config.modules_to_save or ())
    only_adapters = copy.deepcopy(config)
    only_adapters.modules_to_save = None
    linear, beside = lora_targets.asked_for("all-linear", causal_lm), lora_targets.beside_language(causal_lm)
    try:
        asked = lora_targets.name_targets(only_adapters, causal_lm, beside)
        with warnings.catch_warnings():  # PEFT looks for these among modules alone; it follows patterns, we exclude
            warnings.filterwarnings("ignore", "The following (rank|alpha)_pattern keys did not match")
            warnings.filterwarnings("ignore", "You have passed exclude_modules=")
            inject_adapter_in_model(only_adapters, causal_lm, ADAPTER, low_cpu_mem_usage=on_meta)
    except ConfigError:
        raise
    except Exception as error:  # PEFT, of settings that may be a stranger's
        raise ConfigError(
            "model.target_modules cannot be adapted",
            found=(str(error).splitlines() or [type(error).__name__])[0],
            expected="all-linear, names of linear modules, or a regular expression of full names",
        ) from error
    experts.attach(causal_lm)
    _check_adapted(causal_lm)
    _train_whole(causal_lm, config.modules_to_save or ())
    for parameter in causal_lm.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(master)
    if adapter_path is not None and not on_meta:
        _fill_from(causal_lm, adapter_path)
    modules = tuple(name for name, _ in _adapted(causal_lm))
    tensors = tuple(
        f"{n}.{w.parameter_name}" for n, outer in experts.wrapped(causal_lm) for w in experts.wrappers(outer)
    )
    trained = sum(p.numel() for p in causal_lm.parameters() if p.requires_grad)
    whole = tuple(_trained_whole(causal_lm))
    missed = asked - {*modules, *tensors} if tensors or lora_targets.takes_all(config.target_modules) else set()
    if tensors:
        lora_targets.check_names(config.target_modules, missed, linear & set(modules) - asked)
    total = sum(num_weights(causal_lm).values())
    return Adapted(modules + tensors, whole, trained, total, in_four_bits, tuple(sorted(missed)), beside)


def check_groups(causal_lm: Any, model: ModelConfig) -> None:
    """Raises: ConfigError when experts would be a group of their own, which their adapters, read with them, are not in.

    `causal_lm`: with adapters.
    """
    policy = model.fsdp_config.wrap_policy
    kinds = {type(outermost.get_base_layer()).__name__ for _, outermost in experts.wrapped(causal_lm)}
    named = kinds & set(policy.transformer_layer_cls_to_wrap or ())
    if named or (kinds and policy.min_num_params):
        raise ConfigError(
            "adapters of experts that are held in one tensor are read with it, so it cannot be a group of its own",
            found=f"model.fsdp_config.wrap_policy, which groups {', '.join(named) or 'by size'}",
            fix="model.fsdp_config.wrap_policy.min_num_params=0 and no experts in transformer_layer_cls_to_wrap",
        )


def _check_adapted(causal_lm: Any) -> None:
    """Raises: ConfigError for what would not be the same once it is merged, or is not computed here."""
    uses = Counter(id(p) for _, p in causal_lm.named_parameters(remove_duplicate=False))
    head = causal_lm.get_output_embeddings()
    for name, layer in _adapted(causal_lm):
        if uses[id(layer.base_layer.weight)] > 1:
            raise ConfigError(
                "model.target_modules names a weight that two modules share: merged, the adapter would change both",
                found=name,
                fix="leave it out, or train it whole: model.modules_to_save",
            )
        if ADAPTER in layer.lora_magnitude_vector and (layer is head or not isinstance(layer.base_layer, nn.Linear)):
            raise ConfigError(
                "model.use_dora adapts linear modules other than the head",
                found=f"{name}, a {type(layer.base_layer).__name__}",
                fix="leave it out of model.target_modules, or model.use_dora=false",
            )


def _train_whole(causal_lm: Any, names: Sequence[str]) -> None:
    """Modules whose names end so, as in PEFT. Raises: ConfigError when there is none, or one is adapted."""
    adapted = [name for name, _ in [*_adapted(causal_lm), *experts.wrapped(causal_lm)]]
    for wanted in names:
        found = [(name, module) for name, module in causal_lm.named_modules() if name.endswith(wanted)]
        if not found:
            raise ConfigError(f"model.modules_to_save: the model has no module {wanted}", fix="a name such as lm_head")
        for name, module in found:
            if both := [other for other in adapted if f"{other}.".startswith(f"{name}.")]:
                raise ConfigError("model.modules_to_save and model.target_modules name the same module", found=both[0])
            module.requires_grad_(True)


def _trained_whole(causal_lm: Any) -> list[str]:
    """The modules that hold the trained parameters that are no adapter's. Tied weights count under each name."""
    named = causal_lm.named_parameters(remove_duplicate=False)
    owners = {name.rpartition(".")[0] for name, p in named if p.requires_grad and f".{ADAPTER}." not in f"{name}."}
    return sorted(owners)


def saved_config(causal_lm: Any) -> Any:
    """PEFT's config for the files of the adapter: every module that is trained whole stands there by its full name."""
    written = copy.copy(causal_lm.peft_config[ADAPTER])
    for name in ("target_modules", "target_parameters", "exclude_modules"):
        if isinstance(names := getattr(written, name), set):  # whose order is another one in every process
            setattr(written, name, sorted(names))
    written.modules_to_save = _trained_whole(causal_lm) or None
    return written


def _fill_from(causal_lm: Any, path: str) -> None:
    from safetensors.torch import load_file

    check_adapter_file(causal_lm, path)
    saved = load_file(Path(path) / ADAPTER_FILE)
    with torch.no_grad():
        for in_file, _, parameter in trained(causal_lm):
            parameter.copy_(saved.pop(in_file))
    frozen = {_file_name(name): p for name, p in causal_lm.named_parameters(remove_duplicate=False)}
    for in_file, copied in saved.items():
        if not torch.equal(copied.to(frozen[in_file].dtype), frozen[in_file]):
            raise ModelError(
                f"{Path(path) / ADAPTER_FILE} holds other base weights than the model",
                found=in_file,
                fix="the base that the adapter was trained on",
            )


def check_adapter_file(causal_lm: Any, path: str) -> None:
    """The file of the adapter in the folder `path` fits the adapters of a model, which may be on meta.

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
        raise ModelError(f"{file} is no whole safetensors file", found=error) from error
    wanted = {in_file: tuple(p.shape) for in_file, _, p in trained(causal_lm)}
    frozen = {_file_name(name): tuple(p.shape) for name, p in causal_lm.named_parameters(remove_duplicate=False)}
    # PEFT copies the base weight of an adapted embedding or head into the file
    wanted |= {name: shape for name, shape in frozen.items() if name in held and name.endswith(BASE_WEIGHT)}
    if held.keys() != wanted.keys():
        odd = sorted(held.keys() ^ wanted.keys())
        raise ModelError(f"{file} does not fit this model", found=f"{len(odd)} names differ: {', '.join(odd[:3])}")
    for name, shape in wanted.items():
        if held[name] != shape:
            what = f"{file} is the adapter of another model: {name}"
            raise ModelError(what, found=f"shape {held[name]}", expected=f"shape {shape}")


def trained(causal_lm: Any) -> Iterator[tuple[str, str, nn.Parameter]]:
    """Every trained parameter: its name in PEFT's file, its first name in the model, itself. Tied ones come twice."""
    first = {id(p): name for name, p in causal_lm.named_parameters()}
    for name, parameter in causal_lm.named_parameters(remove_duplicate=False):
        if parameter.requires_grad:
            yield _file_name(name), first[id(parameter)], parameter


def _file_name(name: str) -> str:
    plain = name.replace(f".{ADAPTER}.", ".").removesuffix(f".{ADAPTER}")
    if plain.endswith(".lora_magnitude_vector.weight"):
        plain = plain.removesuffix(".weight")
    return f"base_model.model.{plain}"


def adapter_tensors(causal_lm: Any) -> dict[str, Tensor]:
    """What is trained, sharded or not, under the names of PEFT's own files."""
    return {in_file: p.detach() for in_file, _, p in trained(causal_lm)}


@torch.no_grad()
def merge(causal_lm: Any, cast: Callable[[Tensor, torch.dtype, str], Tensor]) -> None:
    """Add every adapter to its weight and take it out: the model is then a plain one again. In place, collective.

    The sum is formed in the adapter's dtype on shards. `cast` makes of it, and of the weight's name, one of the dtype
    that the weight has. Weights in 4 bits become what they stood for, on the CPU, one after the other: that is what was
    trained, and a device that holds them in 4 bits may have no room for them.
    Source: DoRA, arXiv:2402.09353, equation 5.
    """
    for name, layer in _adapted(causal_lm):
        base = layer.base_layer
        weight = base.dense() if isinstance(base, FourBitLinear) else base.weight
        if ADAPTER in layer.lora_A:
            _replicate(layer.lora_A[ADAPTER])
        merged = weight.to(torch.promote_types(weight.dtype, torch.float32)) + layer.get_delta_weight(ADAPTER)
        if ADAPTER in layer.lora_magnitude_vector:
            magnitude = layer.lora_magnitude_vector[ADAPTER].weight
            merged = merged * (magnitude / torch.linalg.vector_norm(merged, dim=1)).unsqueeze(1)
        merged = cast(merged, weight.dtype, f"{name}.weight")
        if isinstance(base, FourBitLinear):
            base = base.plain(merged)
        else:
            base.weight = nn.Parameter(merged, requires_grad=False)
        causal_lm.set_submodule(name, base)
    for name, module in four_bit_modules(causal_lm):
        causal_lm.set_submodule(name, module.plain(module.dense()))
    experts.merge(causal_lm, cast)


def _replicate(linear: nn.Module) -> None:
    """Gather its small weight: the product with a sharded one is then formed on each shard."""
    weight = linear.weight
    if isinstance(weight, DTensor):
        whole = weight.redistribute(placements=[Replicate()] * weight.device_mesh.ndim).detach()
        linear.weight = nn.Parameter(whole, requires_grad=False)


def _adapted(causal_lm: Any) -> list[tuple[str, Any]]:
    """Modules with adapters; not those of which single tensors have some: see `experts`."""
    from peft.tuners.lora import LoraLayer

    layers = ((name, module) for name, module in causal_lm.named_modules() if isinstance(module, LoraLayer))
    return [(name, layer) for name, layer in layers if not experts.is_wrapper(layer)]

"""LoRA by PEFT, applied from outside: inject adapters, and at the end merge them, shard by shard.

A linear module with the weight W, (out, in), becomes one that computes x W' + (x A') B' s: A is (rank, in), B is
(out, rank) and starts at zero, and s is alpha / rank. Only A and B are trained. The merged weight is W + B A s.

Source: LoRA, arXiv:2106.09685.
"""

from __future__ import annotations

import copy
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate

from apollo_sft.config.schema import ModelConfig
from apollo_sft.errors import ConfigError
from apollo_sft.model import adapter_files, experts, lora_targets
from apollo_sft.model.adapter_files import ADAPTER, trained_whole
from apollo_sft.model.four_bit import FourBitLinear, describe, four_bit_modules, num_weights
from apollo_sft.model.lora_targets import Adapted


def lora_config(model: ModelConfig, source: str) -> Any | None:
    """Build PEFT's config from the keys, or read that of the adapter that is continued; None without LoRA.

    Raises: ConfigError when `lora_adapter_path` is no LoRA adapter, or other keys contradict it.
    """
    if model.lora_adapter_path is None and model.lora_rank == 0:
        return None

    if model.lora_adapter_path is not None:
        config = adapter_files.read_config(model, model.lora_adapter_path)
    else:
        config = _new_config(model, source)

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

    # The keys hold tuples; PEFT writes lists into its files.
    targets = model.target_modules
    excluded = model.exclude_modules
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


def inject(causal_lm: Any, config: Any, master: torch.dtype, adapter_path: str | None = None) -> Adapted:
    """Freeze the model and add adapters in `master` dtype, in place; on meta they are without memory too.

    `config.modules_to_save` are trained as they are, in `master` dtype too. PEFT would train a copy of each.
    `adapter_path`: load the trained parameters from this folder (on a rank that holds weights).
    Raises: ConfigError when a key names modules that are not there or cannot be adapted so; ModelError for an adapter
    that does not fit.
    """
    on_meta = next(causal_lm.parameters()).is_meta
    causal_lm.requires_grad_(False)
    in_four_bits = describe(causal_lm, config.modules_to_save or ())

    # Selected before there are adapters: the names of the modules that they wrap change.
    linear = lora_targets.asked_for("all-linear", causal_lm)
    beside = lora_targets.beside_language(causal_lm)
    asked = _add_adapters(causal_lm, config, beside, on_meta)

    experts.attach(causal_lm)
    _check_adapted(causal_lm)
    _train_whole(causal_lm, config.modules_to_save or ())
    for parameter in causal_lm.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(master)

    if adapter_path is not None and not on_meta:
        adapter_files.fill(causal_lm, adapter_path)

    modules = tuple(name for name, _ in _adapted(causal_lm))
    tensors: tuple[str, ...] = ()
    for name, outermost in experts.wrapped(causal_lm):
        tensors += tuple(f"{name}.{wrapper.parameter_name}" for wrapper in experts.wrappers(outermost))

    # Otherwise nothing can be missed: PEFT adapts every linear module that a plain list names.
    missed: set[str] = set()
    if tensors or lora_targets.takes_all(config.target_modules):
        missed = asked - {*modules, *tensors}

    if tensors:
        lora_targets.check_names(config.target_modules, missed, linear & set(modules) - asked)

    num_trained = sum(p.numel() for p in causal_lm.parameters() if p.requires_grad)
    total = sum(num_weights(causal_lm).values())
    whole = tuple(trained_whole(causal_lm))
    return Adapted(modules + tensors, whole, num_trained, total, in_four_bits, tuple(sorted(missed)), beside)


def _add_adapters(causal_lm: Any, config: Any, beside: Sequence[str], on_meta: bool) -> set[str]:
    """Let PEFT add the adapters. Return the names of modules and tensors that were asked for."""
    from peft import inject_adapter_in_model

    only_adapters = copy.deepcopy(config)
    only_adapters.modules_to_save = None
    try:
        asked = lora_targets.name_targets(only_adapters, causal_lm, beside)
        with warnings.catch_warnings():
            # PEFT searches modules only: it reports patterns for tensors, which it does apply, and exclusions of them,
            # which were applied above.
            warnings.filterwarnings("ignore", "The following (rank|alpha)_pattern keys did not match")
            warnings.filterwarnings("ignore", "You have passed exclude_modules=")
            inject_adapter_in_model(only_adapters, causal_lm, ADAPTER, low_cpu_mem_usage=on_meta)
    except ConfigError:
        raise
    except Exception as error:  # PEFT may raise anything for settings of others
        raise ConfigError(
            "model.target_modules cannot be adapted",
            found=(str(error).splitlines() or [type(error).__name__])[0],
            expected="all-linear, names of linear modules, or a regular expression of full names",
        ) from error

    return asked


def check_groups(causal_lm: Any, model: ModelConfig) -> None:
    """Raise a ConfigError when experts with adapters would be a sharding group of their own.

    Their adapters are outside of the module, and would be in another group. `causal_lm`: with adapters.
    """
    policy = model.fsdp_config.wrap_policy
    kinds = {type(outermost.get_base_layer()).__name__ for _, outermost in experts.wrapped(causal_lm)}
    named = kinds & set(policy.transformer_layer_cls_to_wrap or ())
    if named or (kinds and policy.min_num_params):
        raise ConfigError(
            "fused expert tensors with adapters cannot be a sharding group of their own: both are read together",
            found=f"model.fsdp_config.wrap_policy, which groups {', '.join(named) or 'by size'}",
            fix="model.fsdp_config.wrap_policy.min_num_params=0 and no experts in transformer_layer_cls_to_wrap",
        )


def _check_adapted(causal_lm: Any) -> None:
    """Raise a ConfigError for an adapter that would compute something else once it is merged, or is not supported."""
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
    """Unfreeze the modules whose names end so, as PEFT reads them.

    Raises: ConfigError when there is none, or one is adapted.
    """
    adapted = [name for name, _ in [*_adapted(causal_lm), *experts.wrapped(causal_lm)]]
    for wanted in names:
        found = [(name, module) for name, module in causal_lm.named_modules() if name.endswith(wanted)]
        if not found:
            raise ConfigError(f"model.modules_to_save: the model has no module {wanted}", fix="a name such as lm_head")

        for name, module in found:
            both = [other for other in adapted if f"{other}.".startswith(f"{name}.")]
            if both:
                raise ConfigError("model.modules_to_save and model.target_modules name the same module", found=both[0])
            module.requires_grad_(True)


@torch.no_grad()
def merge(causal_lm: Any, cast: Callable[[Tensor, torch.dtype, str], Tensor]) -> None:
    """Add every adapter to its weight and remove it: the model is then a plain one again. In place, collective.

    The sum is formed in the adapter's dtype on shards. `cast` converts it, by the weight's name, to the dtype of the
    weight. Weights in 4 bits are dequantised to the CPU, one by one: with these numbers the adapter was trained, and a
    device that holds them in 4 bits may have no room for them.
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

    # Modules without an adapter: the merged model has none in 4 bits.
    for name, module in four_bit_modules(causal_lm):
        causal_lm.set_submodule(name, module.plain(module.dense()))

    experts.merge(causal_lm, cast)


def _replicate(linear: nn.Module) -> None:
    """Gather the small weight of A: its product with a sharded B is then formed on each shard."""
    weight = linear.weight
    if isinstance(weight, DTensor):
        whole = weight.redistribute(placements=[Replicate()] * weight.device_mesh.ndim).detach()
        linear.weight = nn.Parameter(whole, requires_grad=False)


def _adapted(causal_lm: Any) -> list[tuple[str, Any]]:
    """List the modules with adapters, without those that have adapters on single tensors: see `experts`."""
    from peft.tuners.lora import LoraLayer

    layers = ((name, module) for name, module in causal_lm.named_modules() if isinstance(module, LoraLayer))
    return [(name, layer) for name, layer in layers if not experts.is_wrapper(layer)]

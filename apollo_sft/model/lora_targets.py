"""Select what gets adapters, modules and fused expert tensors, by the keys and by the parts of the model.

PEFT selects modules by their names, but not in every case as the keys promise. This file writes names into PEFT's
config that lead PEFT to the same selection. With `target_modules=all-linear` on a model with a vision tower and fused
experts, for example:

    asked for         every linear module and every fused expert tensor
    minus `others`    what is in the vision tower: `all-linear` is the language model's alone
    plus experts      of architectures that PEFT does not know, as `target_parameters`
    minus routers     whose weight PEFT takes in as a tensor
    minus excluded    what `exclude_modules` names; PEFT excludes modules only, so tensors are excluded here
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from apollo_sft.errors import ConfigError
from apollo_sft.model.experts import DOWN, UP, are_experts

ROUTER = "gate.weight"
"""PEFT's name for the weight of a router, which `all-linear` takes in."""
HALVES = ("gate_proj", "up_proj")
"""The names, in files of models and in `target_modules`, of the two parts of the tensor `UP`."""
CONTINUED = "is_continued"
"""Set on PEFT's config of an adapter that is continued: its names are not checked against the keys. Not saved."""


@dataclass(frozen=True, slots=True)
class Adapted:
    """The result of an injection, with a sentence for the log."""

    modules: tuple[str, ...]
    """Names of adapted modules and tensors."""
    whole: tuple[str, ...]
    """Names of modules that are trained whole beside them."""
    num_trainable: int
    num_parameters: int
    in_four_bits: str = ""
    """A description of what is in 4 bits."""
    left: tuple[str, ...] = ()
    """Names that were asked for and that PEFT cannot adapt."""
    beside: tuple[str, ...] = ()
    """Parts of the model beside its language model."""

    def __str__(self) -> str:
        parts = [self._counted()]
        if self.whole:
            parts.append(f"{', '.join(self.whole)} trained whole")

        share = self.num_trainable / self.num_parameters
        parts.append(f"{self.num_trainable:,} of {self.num_parameters:,} parameters trained ({share:.2%})")

        text = f"LoRA: {', '.join(parts)}{self.in_four_bits}"
        if self.left:
            text += f"; {len(self.left)} asked for and not adapted ({_kinds(self.left)})"
        return text

    def _counted(self) -> str:
        if not self.beside:
            return f"{len(self.modules)} modules adapted ({_kinds(self.modules)})"

        of_language = [name for name in self.modules if not is_in(name, self.beside)]
        words = [f"language model {len(of_language)} modules adapted{_in_brackets(of_language)}"]
        for part in self.beside:
            inside = [name for name in self.modules if is_in(name, [part])]
            words.append(f"{_last(part)} {len(inside)}{_in_brackets(inside)}")
        return ", ".join(words)


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _kinds(names: Iterable[str]) -> str:
    return ", ".join(sorted({_last(name) for name in names}))


def _in_brackets(names: Sequence[str]) -> str:
    return f" ({_kinds(names)})" if names else ""


def is_in(name: str, modules: Iterable[str]) -> bool:
    """Return whether a module is one of `modules`, or inside of one."""
    return any(f"{name}.".startswith(f"{module}.") for module in modules)


def beside_language(causal_lm: Any) -> tuple[str, ...]:
    """Return the names of the modules that are no part of the language model.

    They are towers for images and sound, and what leads from there to the text. () for a model of text alone.
    `causal_lm`: without adapters.
    """
    config = causal_lm.config
    head = causal_lm.get_output_embeddings()
    decoder = causal_lm.get_decoder()
    name = next((name for name, module in causal_lm.named_modules() if module is decoder), "")
    if not name:
        return ()

    # Most of these are models of text alone; in some, towers are among the layers.
    inside = [f"{name}.{child}" for child, module in decoder.named_children() if _holds_tower(module)]
    if config.get_text_config() is config:
        return tuple(inside)

    # On each level above the language model, everything beside it, but for the head and modules without weights.
    beside = []
    above = ["", *(name[: dot.start()] for dot in re.finditer(r"\.", name))]
    for parent in above:
        for child, module in causal_lm.get_submodule(parent).named_children():
            full = f"{parent}.{child}".removeprefix(".")
            is_text = module is head or full == name or full in above
            if not is_text and next(module.parameters(), None) is not None:
                beside.append(full)

    return (*beside, *inside)


def _holds_tower(module: nn.Module) -> bool:
    """Return whether a model that reads no text is in it, by the modalities that transformers declares."""
    return any("text" not in getattr(part, "input_modalities", "text") for part in module.modules())


def takes_all(targets: Any) -> bool:
    """Return whether PEFT reads `target_modules` as `all-linear`, in upper or lower case."""
    return isinstance(targets, str) and targets.lower() == "all-linear"


def name_targets(config: Any, causal_lm: Any, beside: Sequence[str]) -> set[str]:
    """Write names into PEFT's config, in place, by which PEFT alone selects what the keys ask for.

    `beside`: modules that are no part of the language model.
    Return the linear modules outside of the head, and experts of `all-linear`, that were asked for.
    Raises: ConfigError for what PEFT's adapters of tensors cannot do, and for exclusions that exclude nothing, or all;
    re.error.
    """
    targets = config.target_modules
    everything = takes_all(targets)
    others = beside if everything else ()
    asked = {name for name in asked_for(targets, causal_lm) if not is_in(name, others)}
    names = _names_of_tensors(config, causal_lm)
    if others:
        config.target_modules = _linear_of_language(config.target_modules, asked, causal_lm)

    tensors = _tensors(causal_lm)
    is_continued = getattr(config, CONTINUED, False)
    if config.exclude_modules and not is_continued:
        experts = {name for name in tensors if _is_named(names, name)}
        candidates = _candidates(config, causal_lm, everything, experts)
        wanted = candidates
        if everything:
            wanted = candidates & (asked | experts)
        _check_exclusions(config, candidates, wanted, tensors)

    # A saved adapter has all tensors that it names, since PEFT itself excludes none.
    kept = {name for name in tensors if not is_in(name, others)}
    if everything or not is_continued:
        kept = {name for name in kept if not _is_excluded(config, name, tensors)}

    config.target_parameters = _names_of_kept(names, tensors, kept) or None
    _check_tensors(config)
    return {name for name in asked if not _is_excluded(config, name, tensors)}


def _names_of_tensors(config: Any, causal_lm: Any) -> set[str]:
    """Return PEFT's names of fused expert tensors.

    PEFT also rewrites `target_modules` in its config, in place, as it does for a model that it converts.
    """
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    # Without exclusions: PEFT would convert them too, but excludes no tensors. `name_targets` does that.
    everything = takes_all(config.target_modules)
    excluded = config.exclude_modules
    config.exclude_modules = None
    convert_peft_config_for_transformers(config, causal_lm, None)
    config.exclude_modules = excluded

    names = set(config.target_parameters or ())
    if not everything:
        return names
    return (names - {ROUTER}) | _names_of_unknown_experts(config, causal_lm, names)


def _names_of_unknown_experts(config: Any, causal_lm: Any, known: set[str]) -> set[str]:
    """Return the names of experts of architectures that PEFT does not know, in the form of those that it knows."""
    found: set[str] = set()
    for name, module in causal_lm.named_modules():
        if are_experts(module) and not any(f"{name}.{UP}".endswith(f".{target}") for target in known):
            found |= {f"{_last(name)}.{tensor}" for tensor in (UP, DOWN)}
            # Gate and up are one tensor, which gets the rank and the alpha of two adapters.
            config.rank_pattern[rf".*\.{UP}"] = 2 * config.r
            config.alpha_pattern[rf".*\.{UP}"] = 2 * config.lora_alpha
    return found


def _linear_of_language(targets: Any, asked: set[str], causal_lm: Any) -> set[str]:
    """Return the full names of the linear modules of the language model: last names often occur in a tower, too.

    `targets`: last names where PEFT knows the experts of the architecture, and `all-linear` elsewhere.
    """
    linear = {name for name, module in causal_lm.named_modules() if isinstance(module, nn.Linear)} & asked
    if takes_all(targets):
        return linear
    return {name for name in linear if _last(name) in targets}


def _tensors(causal_lm: Any) -> set[str]:
    return {name for name, _ in causal_lm.named_parameters(remove_duplicate=False)}


def _names_of_kept(names: set[str], tensors: set[str], kept: set[str]) -> set[str]:
    """Replace a name by the full names of the tensors that are kept, unless all of its tensors are.

    A name without a tensor stays: PEFT refuses it.
    """
    found: set[str] = set()
    for name in names:
        named = {tensor for tensor in tensors if _is_named([name], tensor)}
        if named <= kept:
            found.add(name)
        else:
            found |= named & kept
    return found


def _check_tensors(config: Any) -> None:
    """Raise a ConfigError for settings that adapters of tensors do not support."""
    unsupported = {"lora_dropout": ("dropout", config.lora_dropout), "use_dora": ("DoRA", config.use_dora)}
    for key, (name, wanted) in unsupported.items():
        if wanted and config.target_parameters:
            raise ConfigError(
                f"model.{key}: {name} is not supported for adapters on fused expert tensors",
                found=f"{', '.join(sorted(config.target_parameters))} among what is adapted",
                fix=f"leave model.{key} out, or name other modules: model.target_modules=[q_proj,k_proj,v_proj,o_proj]",
            )


def asked_for(targets: Any, causal_lm: Any) -> set[str]:
    """Return the linear modules outside of the head that `targets` names, and for `all-linear` fused expert tensors.

    `causal_lm`: without adapters. Raises: re.error.
    """
    head = causal_lm.get_output_embeddings()
    linear = {name for name, m in causal_lm.named_modules() if isinstance(m, nn.Linear) and m is not head}
    if not takes_all(targets):
        return {name for name in linear if _is_named(targets, name)}

    # Fused experts have three dims. So have weights of convolutions, and fused biases are none of them.
    experts = set()
    for module_name, module in causal_lm.named_modules():
        if isinstance(module, nn.modules.conv._ConvNd):
            continue
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.ndim == 3 and not name.endswith("_bias"):
                experts.add(f"{module_name}.{name}")

    return linear | experts


def _is_named(names: Any, name: str) -> bool:
    """Return whether PEFT reads `names`, an expression of full names or a list of ends of names, as meaning `name`."""
    if isinstance(names, str):
        return re.fullmatch(names, name) is not None
    return any(f".{name}".endswith(f".{end}") for end in names)


def _spellings(name: str, tensors: set[str]) -> Iterator[tuple[str, ...]]:
    """Yield the names by which an exclusion may mean something; of several in one tuple it must name all.

    It is the name itself; for a tensor also that of its module, or those of both of its halves.
    """
    yield (name,)
    if name in tensors:
        owner, _, last = name.rpartition(".")
        yield (owner,)
        if last == UP:
            yield tuple(f"{owner}.{half}" for half in HALVES)


def _is_excluded(config: Any, name: str, tensors: set[str]) -> bool:
    excluded = config.exclude_modules
    if not excluded:
        return False

    spellings = [set(spelling) for spelling in _spellings(name, tensors)]
    named = {each for each in set().union(*spellings) if _is_named(excluded, each)}
    return any(spelling <= named for spelling in spellings)


def _candidates(config: Any, causal_lm: Any, everything: bool, experts: set[str]) -> set[str]:
    """Return what an exclusion may exclude. `experts`: tensors that are named.

    For `all-linear` every linear module counts: those of towers and the head are left out anyway, but it is no mistake
    to exclude them.
    """
    modules = dict(causal_lm.named_modules())
    if everything:
        return experts | {name for name, module in modules.items() if isinstance(module, nn.Linear)}
    return experts | {name for name in modules if _is_named(config.target_modules, name)}


def _check_exclusions(config: Any, candidates: set[str], wanted: set[str], tensors: set[str]) -> None:
    """Raise a ConfigError when an exclusion excludes nothing, as a misspelt one does, or when nothing is left.

    `wanted`: those of the candidates that would be adapted without exclusions.
    """
    excluded = {name for name in candidates if _is_excluded(config, name, tensors)}
    spelled: set[str] = set()
    for name in excluded:
        for spelling in _spellings(name, tensors):
            spelled.update(spelling)

    # An expression is one entry; a list has an entry for each end of names.
    every = config.exclude_modules
    entries: dict[str, Any] = {}
    if isinstance(every, str):
        entries[every] = every
    else:
        entries = {entry: [entry] for entry in sorted(every)}

    odd = [entry for entry, names in entries.items() if not any(_is_named(names, each) for each in spelled)]

    if odd and candidates:
        known = sorted({_last(name) for name in candidates})
        close: list[str] = []
        for entry in odd:
            close += difflib.get_close_matches(entry, known, n=1)

        raise ConfigError(
            "model.exclude_modules excludes nothing of what model.target_modules takes in",
            found=", ".join(odd),
            expected=f"ends of names ({', '.join(known)}), or an expression of full names such as "
            f"{min(wanted or candidates)}",
            fix=f"did you mean {', '.join(close)}?" if close else None,
        )

    if wanted and wanted <= excluded:
        raise ConfigError(
            "model.exclude_modules excludes everything: LoRA would train nothing",
            found=f"{len(wanted)} modules ({_kinds(wanted)}), all of them excluded",
            expected="some that are left",
            fix="take names out of model.exclude_modules",
        )


def check_names(targets: Any, missed: set[str], unasked: set[str]) -> None:
    """Raise a ConfigError when full names in `targets` did not lead to exactly the modules that they name.

    Beside fused experts, PEFT reads names as last names where it knows the architecture.
    """
    in_full = not takes_all(targets) and (isinstance(targets, str) or any("." in target for target in targets))
    if in_full and (missed or unasked):
        found = []
        if missed:
            found.append(f"{len(missed)} named and not adapted, such as {min(missed)}")

        if unasked:
            found.append(f"{len(unasked)} adapted and not named, such as {min(unasked)}")

        raise ConfigError(
            "model.target_modules: beside fused experts, PEFT reads names in this architecture as last names",
            found="; ".join(found),
            fix="last names, model.target_modules=[q_proj,v_proj], and experts by model.target_parameters",
        )

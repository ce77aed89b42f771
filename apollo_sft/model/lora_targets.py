"""What gets adapters: modules and experts that are held in one tensor, by the keys and by the parts of the model."""

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
"""What PEFT calls the weight of a router where `all-linear` takes it in."""
HALVES = ("gate_proj", "up_proj")
"""What lies in the tensor `UP`, as files of models and `target_modules` call it."""
CONTINUED = "is_continued"
"""Set on PEFT's config of an adapter that is continued, whose names are a fact and no wish. It is not saved."""


@dataclass(frozen=True, slots=True)
class Adapted:
    """What was adapted: names of modules and tensors, those trained whole beside them, and parameters that are trained,
    of all. `in_four_bits`: what is held so, in words. `left`: what was asked for and PEFT cannot adapt. `beside`: parts
    of the model beside its language model.
    """

    modules: tuple[str, ...]
    whole: tuple[str, ...]
    num_trainable: int
    num_parameters: int
    in_four_bits: str = ""
    left: tuple[str, ...] = ()
    beside: tuple[str, ...] = ()

    def __str__(self) -> str:
        share = self.num_trainable / self.num_parameters
        whole = f"{', '.join(self.whole)} trained whole, " if self.whole else ""
        return (
            f"LoRA: {self._counted()}, {whole}"
            f"{self.num_trainable:,} of {self.num_parameters:,} parameters trained ({share:.2%}){self.in_four_bits}"
            + (f"; {len(self.left)} asked for and not adapted ({_kinds(self.left)})" if self.left else "")
        )

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
    """Whether it is one of `modules`, or inside of one."""
    return any(f"{name}.".startswith(f"{module}.") for module in modules)


def beside_language(causal_lm: Any) -> tuple[str, ...]:
    """Names of the modules that are no part of the language model: towers for images and sound, what leads from there
    to the text. () for a model of text alone. `causal_lm`: without adapters.
    """
    config, head, decoder = causal_lm.config, causal_lm.get_output_embeddings(), causal_lm.get_decoder()
    name = next((name for name, module in causal_lm.named_modules() if module is decoder), "")
    if not name:
        return ()
    inside = [f"{name}.{child}" for child, module in decoder.named_children() if _holds_tower(module)]
    if config.get_text_config() is config:
        return tuple(inside)  # most are models of text alone; in some the towers lie among the layers

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
    """Whether a model that reads no text is in it: transformers says so of each model."""
    return any("text" not in getattr(part, "input_modalities", "text") for part in module.modules())


def takes_all(targets: Any) -> bool:
    """Whether PEFT reads `target_modules` as `all-linear`, which it takes in any case of letters."""
    return isinstance(targets, str) and targets.lower() == "all-linear"


def name_targets(config: Any, causal_lm: Any, beside: Sequence[str]) -> set[str]:
    """Write what gets adapters into PEFT's config, in place, in names that lead PEFT alone to the same.

    `all-linear` is the language model's alone, and of experts in one tensor adds those of architectures that PEFT does
    not know, and takes tensors of routers out. `beside`: modules that are no part of the language model.

    Returns: linear modules outside of the head, and experts of `all-linear`, that were asked for.
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
        _check_exclusions(config, candidates, candidates & (asked | experts) if everything else candidates, tensors)

    kept = {name for name in tensors if not is_in(name, others)}
    if everything or not is_continued:  # a saved adapter has the tensors that it names: PEFT excludes none
        kept = {name for name in kept if not _is_excluded(config, name, tensors)}
    config.target_parameters = _names_of_kept(names, tensors, kept) or None
    _check_tensors(config)
    return {name for name in asked if not _is_excluded(config, name, tensors)}


def _names_of_tensors(config: Any, causal_lm: Any) -> set[str]:
    """PEFT's names of experts in one tensor. What else PEFT reads from `target_modules` is written there, in place."""
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    everything = takes_all(config.target_modules)
    excluded, config.exclude_modules = config.exclude_modules, None  # PEFT excludes modules, and no tensors: see below
    convert_peft_config_for_transformers(config, causal_lm, None)
    config.exclude_modules = excluded
    names = set(config.target_parameters or ())
    return names - {ROUTER} | _names_of_the_rest(config, causal_lm, names) if everything else names


def _names_of_the_rest(config: Any, causal_lm: Any, known: set[str]) -> set[str]:
    """Experts of architectures that PEFT does not know, as it names those that it knows: gate and up, which lie in one
    tensor, with the rank and the alpha of two, in place."""
    found: set[str] = set()
    for name, module in causal_lm.named_modules():
        if are_experts(module) and not any(f"{name}.{UP}".endswith(f".{target}") for target in known):
            found |= {f"{_last(name)}.{tensor}" for tensor in (UP, DOWN)}
            config.rank_pattern[rf".*\.{UP}"], config.alpha_pattern[rf".*\.{UP}"] = 2 * config.r, 2 * config.lora_alpha
    return found


def _linear_of_language(targets: Any, asked: set[str], causal_lm: Any) -> set[str]:
    """Full names: the last names of a language model's modules are often those of a tower's, too. `targets`: last names
    where PEFT knows the experts of the architecture, and `all-linear` elsewhere."""
    linear = {name for name, module in causal_lm.named_modules() if isinstance(module, nn.Linear)} & asked
    return linear if takes_all(targets) else {name for name in linear if _last(name) in targets}


def _tensors(causal_lm: Any) -> set[str]:
    return {name for name, _ in causal_lm.named_parameters(remove_duplicate=False)}


def _names_of_kept(names: set[str], tensors: set[str], kept: set[str]) -> set[str]:
    """Names as they are where all that they name is kept, and where there is nothing, which PEFT refuses; else the full
    names of what is kept: PEFT excludes no tensors."""
    found: set[str] = set()
    for name in names:
        named = {tensor for tensor in tensors if _is_named([name], tensor)}
        found |= {name} if named <= kept else named & kept
    return found


def _check_tensors(config: Any) -> None:
    """Raises: ConfigError."""
    for wrong, key in ((config.lora_dropout, "lora_dropout"), (config.use_dora, "use_dora")):
        if wrong and config.target_parameters:
            raise ConfigError(
                f"model.{key}: adapters of experts that are held in one tensor know none",
                found=f"{', '.join(sorted(config.target_parameters))} among what is adapted",
                fix=f"leave model.{key} out, or name other modules: model.target_modules=[q_proj,k_proj,v_proj,o_proj]",
            )


def asked_for(targets: Any, causal_lm: Any) -> set[str]:
    """Linear modules outside of the head that `targets` names, of a model without adapters; of `all-linear` experts in
    one tensor, too. Raises: re.error."""
    head = causal_lm.get_output_embeddings()
    linear = {name for name, m in causal_lm.named_modules() if isinstance(m, nn.Linear) and m is not head}
    if not takes_all(targets):
        return {name for name in linear if _is_named(targets, name)}
    plain = (m for m in causal_lm.named_modules() if not isinstance(m[1], nn.modules.conv._ConvNd))
    of_each = ((f"{name}.{n}", p) for name, m in plain for n, p in m.named_parameters(recurse=False))
    return linear | {name for name, parameter in of_each if parameter.ndim == 3 and not name.endswith("_bias")}


def _is_named(names: Any, name: str) -> bool:
    """Whether PEFT reads `names`, an expression of full names or ends of names, as meaning `name`."""
    if isinstance(names, str):
        return re.fullmatch(names, name) is not None
    return any(f".{name}".endswith(f".{end}") for end in names)


def _spellings(name: str, tensors: set[str]) -> Iterator[tuple[str, ...]]:
    """By what an exclusion may name it: itself; of a tensor, too, the module that holds it, or both of its halves."""
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
    return any(all(_is_named(excluded, each) for each in spelling) for spelling in _spellings(name, tensors))


def _candidates(config: Any, causal_lm: Any, everything: bool, experts: set[str]) -> set[str]:
    """What an exclusion may exclude. Of `all-linear` every linear module counts: that those of towers and the head are
    left out in any case makes no exclusion of them wrong. `experts`: tensors that are named."""
    modules = dict(causal_lm.named_modules())
    if everything:
        return experts | {name for name, module in modules.items() if isinstance(module, nn.Linear)}
    return experts | {name for name in modules if _is_named(config.target_modules, name)}


def _check_exclusions(config: Any, candidates: set[str], wanted: set[str], tensors: set[str]) -> None:
    """`wanted`: those of the candidates that would be adapted without exclusions.

    Raises: ConfigError when an exclusion excludes nothing, which is what a misspelt one does; when nothing is left.
    """
    excluded = {name for name in candidates if _is_excluded(config, name, tensors)}
    called = {each for name in excluded for spelling in _spellings(name, tensors) for each in spelling}
    every = config.exclude_modules
    entries = {every: every} if isinstance(every, str) else {entry: [entry] for entry in sorted(every)}
    odd = [entry for entry, names in entries.items() if not any(_is_named(names, each) for each in called)]
    if odd and candidates:
        known = sorted({_last(name) for name in candidates})
        close = [match for entry in odd for match in difflib.get_close_matches(entry, known, n=1)]
        ends, full = ", ".join(known), min(wanted or candidates)
        raise ConfigError(
            "model.exclude_modules excludes nothing of what model.target_modules takes in",
            found=", ".join(odd),
            expected=f"ends of names ({ends}), or an expression of full names such as {full}",
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
    """What became of `targets` beside adapted experts. PEFT takes names for last names where it knows the architecture.

    Raises: ConfigError when others than those that are named in full are adapted.
    """
    in_full = not takes_all(targets) and (isinstance(targets, str) or any("." in target for target in targets))
    if in_full and (missed or unasked):
        raise ConfigError(
            "model.target_modules: beside experts in one tensor, PEFT takes modules of this architecture by last names",
            found="; ".join(
                f"{len(names)} {what}, such as {min(names)}"
                for what, names in (("named and not adapted", missed), ("adapted and not named", unasked))
                if names
            ),
            fix="last names, model.target_modules=[q_proj,v_proj], and experts by model.target_parameters",
        )

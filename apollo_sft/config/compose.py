"""Command line -> validated config: Hydra's grammar, our aliases, Hydra's composition, the schema, cross-checks."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, TypeVar

import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException
from pydantic import ValidationError

from apollo_sft.config.aliases import REFUSED, REFUSED_SECTIONS, RENAMED, WITHOUT_EFFECT
from apollo_sft.config.checks import check_combinations
from apollo_sft.config.overrides import Setting, leaves, parse
from apollo_sft.config.schema import KEYS, FileSet, SftConfig, Source
from apollo_sft.errors import ConfigError
from apollo_sft.redact import redact

T = TypeVar("T")
YAML_PATH = Path(__file__).parent / "sft_trainer.yaml"
OPEN_DICTS = ("data.apply_chat_template_kwargs.",)
"""Keys below these are the user's own."""
EXPECTED = {
    "model_type": "a dict; its keys are set one by one: {key}.…=value",
    "dict_type": "a dict: {{name: value}}",
    "string_too_short": "a text that is not empty",
    "string_type": "a text",
    "int_type": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "tuple_type": "a list: [a,b]",
    "missing": "it is given",
}
"""Our words for what pydantic expects, by its kind of error."""


@dataclass(frozen=True, slots=True)
class Composed:
    """`overridden`: what was set on the command line, key to value. `notes`: what the user should be told."""

    config: SftConfig
    overridden: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def compose(arguments: Sequence[str]) -> Composed:
    """The config of a command line such as `["data.max_length=2048", "optim.lr=1e-4"]`.

    Raises: ConfigError with every problem of the command line in one message.
    """
    notes: list[str] = []
    problems: list[str] = []
    attempts = [_attempt(partial(_read, argument, notes), problems) for argument in arguments]
    settings = [setting for setting in attempts if setting is not None]
    given = dict(pair for setting in settings for pair in _set_by(setting))
    problems += _contradictions(settings, notes)
    raw = _attempt(partial(_hydra, settings), problems)
    config = None if raw is None else _attempt(partial(validate, raw), problems)
    if config is not None and not problems:
        _attempt(partial(check_combinations, config, set(given), notes), problems)
    if problems or config is None:
        raise ConfigError("\n".join(problems))
    return Composed(config, {key: _lookup(raw, key) for key in given}, notes)


def validate(raw: dict[str, Any]) -> SftConfig:
    """Raises: ConfigError for every unknown key, wrong type and value out of range, all in one message."""
    try:
        return SftConfig.model_validate(raw)
    except ValidationError as error:
        merged: dict[str, Any] = {}
        for problem in error.errors():
            merged.setdefault(_key_of(problem), problem)
        raise ConfigError("\n".join(_explain(key, problem) for key, problem in merged.items())) from error


def recorded(config: SftConfig) -> dict[str, Any]:
    """The resolved configuration as it may be written down: without secrets."""
    return redact(config.model_dump(mode="json"))


def to_yaml(config: SftConfig) -> str:
    """The resolved configuration, as it is saved beside the run."""
    return yaml.safe_dump(recorded(config), sort_keys=False, allow_unicode=True)


@cache
def known_keys() -> tuple[str, ...]:
    """Every key of the yaml, leaves only, in order."""
    return tuple(key for key, _ in leaves(defaults()))


@cache
def defaults() -> dict[str, Any]:
    """Read the default of every key, as a tree of sections.

    Raises: ConfigError for a yaml that was not made from this schema: in a checkout where a key was added or removed.
    """
    tree: dict[str, Any] = yaml.safe_load(YAML_PATH.read_text(encoding="utf-8"))
    differing = {key for key, _ in leaves(tree)} ^ KEYS.keys()
    if differing:
        raise ConfigError(
            f"{YAML_PATH} does not have the keys of the schema",
            found=f"only one of them has {', '.join(sorted(differing))}",
            fix="make docs-reference writes the yaml anew",
        )
    return tree


def _attempt(work: Callable[[], T], problems: list[str]) -> T | None:
    """The result, or None and one problem more: the user shall see all of them at once."""
    try:
        return work()
    except ConfigError as error:
        problems.append(str(error))
        return None


def _read(argument: str, notes: list[str]) -> Setting | None:
    """One argument, under the name that the yaml has; None when it has no effect. Raises: ConfigError."""
    setting = _apply_alias(parse(argument), notes)
    if setting is not None:
        _check_key(setting)
    return setting


def _apply_alias(setting: Setting, notes: list[str]) -> Setting | None:
    key = setting.key
    if key in RENAMED:
        notes.append(f"{key} is read as {RENAMED[key]}")
        return replace(setting, prefix="++" if setting.prefix else "", key=RENAMED[key])
    if key in WITHOUT_EFFECT:
        notes.append(f"{key} has no effect: {WITHOUT_EFFECT[key]}")
        return None
    instead = REFUSED.get(key, REFUSED_SECTIONS.get(key.partition(".")[0]))
    if instead is not None:
        raise ConfigError(f"{key} is not a key of this trainer", fix=instead)
    if f"{key}.".startswith(OPEN_DICTS):
        return replace(setting, prefix="++")
    return setting


def _set_by(setting: Setting) -> Iterator[tuple[str, tuple[str, Any]]]:
    """(key, (its spelling, its value)) of all that one argument sets: `optim={lr: 1, betas: [0, 0]}` sets two keys."""
    if isinstance(setting.content, dict) and setting.key not in known_keys():
        for key, content in leaves(setting.content, f"{setting.key}."):
            yield key, (key, content)
    else:
        yield setting.key, (setting.spelling, setting.content)


def _contradictions(settings: list[Setting], notes: list[str]) -> Iterator[str]:
    """Two spellings of one key with two values are a problem. A key that is repeated is noted: its last value counts,
    as in Hydra, so that a script's `"$@"` at the end of its line overrides what stands before it."""
    seen: dict[str, tuple[str, Any]] = {}
    for key, (spelling, value) in (pair for setting in settings for pair in _set_by(setting)):
        before, first = seen.get(key, (spelling, value))
        seen[key] = (spelling, value)
        if first == value:
            continue
        if before == spelling:
            notes.append(f"{key} is given twice, {first} and then {value}: the last one counts")
        else:
            what = f"{before} and {spelling} mean the same, but differ"
            yield str(ConfigError(what, found=f"{first} and {value}", expected="one value", fix=f"{key}={value}"))


def _check_key(setting: Setting) -> None:
    keys = known_keys()
    sections = {key.rsplit(".", depth)[0] for key in keys for depth in range(1, key.count(".") + 1)}
    key = setting.key
    if key not in keys and key not in sections and not key.startswith(OPEN_DICTS):
        raise _unknown_key(key)
    if setting.prefix == "+" and key in keys and setting.value[:1] not in ("[", "{"):
        raise ConfigError(f"+{key}: the key exists already", fix=f"write {key}={setting.value} without the +")


def _unknown_key(key: str) -> ConfigError:
    """Names the key of the same last name (perhaps in another section), else the one that is spelt most alike."""
    keys = known_keys()
    last = key.lower().rpartition(".")[2]
    same_name = [known for known in keys if known.rpartition(".")[2] == last]
    cutoff = 0.5 if "." in key else 0.0
    close = difflib.get_close_matches(key.lower(), same_name, n=1, cutoff=cutoff)
    close = close or difflib.get_close_matches(key.lower(), keys, n=1, cutoff=0.7)
    fix = f"did you mean {close[0]}?" if close else "apollo-sft train --help lists every key"
    return ConfigError(f"unknown key {key}", fix=fix)


def _hydra(settings: list[Setting]) -> dict[str, Any]:
    """The composed tree, interpolations resolved. Raises: ConfigError."""
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(YAML_PATH.parent), version_base="1.3"):
            composed = hydra_compose(YAML_PATH.stem, overrides=[setting.text for setting in settings])
        return OmegaConf.to_container(composed, resolve=True)  # type: ignore[return-value]
    except (HydraException, OmegaConfBaseException) as error:
        cause = error.__cause__ or error
        key = getattr(cause, "full_key", None)
        if isinstance(cause, ConfigKeyError) and key:
            raise _unknown_key(key) from error
        what = f"{key} has a value that cannot be used" if key else "the configuration cannot be composed"
        found = re.sub(r"^\w+ raised while resolving interpolation: ", "", str(cause).splitlines()[0]).strip('"')
        raise ConfigError(what, found=found) from error


def _explain(key: str, problem: Any) -> str:
    found, kind = problem["input"], problem["type"]
    found = list(found) if isinstance(found, tuple) else found
    if kind == "extra_forbidden":
        return str(_unknown_field(key) if "[" in key else _unknown_key(key))
    fix = None
    expected = problem["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
    if kind in EXPECTED:
        expected = EXPECTED[kind].format(key=key)
    elif kind in ("too_short", "too_long"):
        expected = f"a list of {problem['ctx'].get('min_length', problem['ctx'].get('max_length'))}"
        expected += " or more" if key.endswith("].path") else ""
    if kind == "string_type" and isinstance(found, int | float):
        fix = f"quote a number or a word such as true that is meant as text: \"{key}='…'\""
    return str(ConfigError(f"{key} has a value that cannot be used", found=f"{found!r}", expected=expected, fix=fix))


def _unknown_field(key: str) -> ConfigError:
    fields = (Source if key.startswith("data.train_files") else FileSet).model_fields
    return ConfigError(f"unknown key {key}", expected=f"one of {', '.join(fields)}")


def _key_of(problem: Any) -> str:
    """The dotted key of a pydantic problem, without the positions and union branches that pydantic adds, but for a
    field of a source: data.train_files[1].weight.
    """
    parts: list[str] = []
    for place, part in enumerate(problem["loc"]):
        if isinstance(part, int) or ".".join(parts) in known_keys():
            match problem["loc"][place:]:
                case (int(number), "source", str(name), *_):
                    return f"{'.'.join(parts)}[{number}].{name}"
            break
        parts.append(str(part))
    return ".".join(parts)


def _lookup(tree: Any, key: str) -> Any:
    for part in key.split("."):
        if not isinstance(tree, dict) or part not in tree:
            return None
        tree = tree[part]
    return tree

"""Command line -> validated config: Hydra's grammar, our aliases, OmegaConf's tree, the schema, cross-checks.

`optim.lr=1e-4 model.path=/m`, for example, is parsed to two settings; the alias makes the second one
`model.partial_pretrain=/m` and adds a note; OmegaConf puts both values into the tree of sft_trainer.yaml; the schema
checks every type and range; the cross-checks compare keys with each other. Each stage collects its problems, so that a
user sees all of them at once.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, TypeVar

import yaml
from hydra.core.utils import setup_globals
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
"""The keys below these are chosen by the user."""
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
"""What we write for `expected`, by pydantic's kind of error."""


@dataclass(frozen=True, slots=True)
class Composed:
    """A config with the way it came about."""

    config: SftConfig
    overridden: dict[str, Any] = field(default_factory=dict)
    """The keys that were set on the command line, with their values."""
    notes: list[str] = field(default_factory=list)
    """Messages for the user, such as the use of an alias."""


def compose(arguments: Sequence[str]) -> Composed:
    """Compose the config of a command line such as `["data.max_length=2048", "optim.lr=1e-4"]`.

    Raises: ConfigError with every problem of the command line in one message.
    """
    notes: list[str] = []
    problems: list[str] = []
    attempts = [_attempt(partial(_read, argument, notes), problems) for argument in arguments]
    settings = [setting for setting in attempts if setting is not None]
    given = _keys_set_by(settings)
    problems += _contradictions(settings, notes)

    raw = _attempt(partial(_compose, settings), problems)
    config: SftConfig | None = None
    if raw is not None:
        config = _attempt(partial(validate, raw), problems)

    # Cross-checks on top of other problems would report what follows from those.
    if config is not None and not problems:
        _attempt(partial(check_combinations, config, set(given), notes), problems)

    if problems or config is None:
        raise ConfigError("\n".join(problems))
    return Composed(config, {key: _lookup(raw, key) for key in given}, notes)


def validate(raw: dict[str, Any]) -> SftConfig:
    """Validate a tree. Raises: ConfigError for every unknown key, wrong type and value out of range, in one message."""
    try:
        return SftConfig.model_validate(raw)
    except ValidationError as error:
        # pydantic reports a value once for each type that it tried: the first report of a key is enough.
        merged: dict[str, Any] = {}
        for problem in error.errors():
            merged.setdefault(_key_of(problem), problem)
        raise ConfigError("\n".join(_explain(key, problem) for key, problem in merged.items())) from error


def recorded(config: SftConfig) -> dict[str, Any]:
    """Return the resolved configuration as it may be saved: without secrets."""
    return redact(config.model_dump(mode="json"))


def to_yaml(config: SftConfig) -> str:
    """Return the resolved configuration as the text of config.yaml."""
    return yaml.safe_dump(recorded(config), sort_keys=False, allow_unicode=True)


@cache
def known_keys() -> tuple[str, ...]:
    """List every key of the yaml, leaves only, in order."""
    return tuple(key for key, _ in leaves(defaults()))


@cache
def defaults() -> dict[str, Any]:
    """Read the default of every key, as a tree of sections.

    Raises: ConfigError for a yaml that was not made from this schema: in a checkout where a key was added or removed.
    """
    tree: dict[str, Any] = OmegaConf.to_container(OmegaConf.load(YAML_PATH))  # type: ignore[assignment]
    differing = {key for key, _ in leaves(tree)} ^ KEYS.keys()
    if differing:
        raise ConfigError(
            f"{YAML_PATH} does not have the keys of the schema",
            found=f"only one of them has {', '.join(sorted(differing))}",
            fix="make docs-reference rewrites the yaml",
        )
    return tree


def _attempt(work: Callable[[], T], problems: list[str]) -> T | None:
    """Return the result, or None with one problem more."""
    try:
        return work()
    except ConfigError as error:
        problems.append(str(error))
        return None


def _read(argument: str, notes: list[str]) -> Setting | None:
    """Parse one argument, under the name that the yaml has; None when it has no effect. Raises: ConfigError."""
    setting = _apply_alias(parse(argument), notes)
    if setting is not None:
        _check_key(setting)
    return setting


def _apply_alias(setting: Setting, notes: list[str]) -> Setting | None:
    """Return the setting under our own name of the key; None, with a note, when it has no effect."""
    key = setting.key
    if key in RENAMED:
        notes.append(f"{key} is read as {RENAMED[key]}")
        # With +, Hydra adds a key that the yaml lacks, but it has the renamed one: ++ sets it either way.
        prefix = "++" if setting.prefix else ""
        return replace(setting, prefix=prefix, key=RENAMED[key])

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
    """Yield (key, (its spelling, its value)) for what one argument sets: `optim={lr: 1, betas: [0, 0]}` sets two."""
    if isinstance(setting.content, dict) and setting.key not in known_keys():
        for key, content in leaves(setting.content, f"{setting.key}."):
            yield key, (key, content)
    else:
        yield setting.key, (setting.spelling, setting.content)


def _keys_set_by(settings: list[Setting]) -> list[str]:
    """List the keys that are set, each once, in the order of the command line."""
    keys: dict[str, None] = {}
    for setting in settings:
        keys.update(dict.fromkeys(key for key, _ in _set_by(setting)))
    return list(keys)


def _contradictions(settings: list[Setting], notes: list[str]) -> Iterator[str]:
    """Yield a problem for two spellings of one key with two values; note a key that is repeated.

    The last value of a repeated key counts, as in Hydra: the `"$@"` at the end of a script's line overrides what comes
    before it.
    """
    seen: dict[str, tuple[str, Any]] = {}
    for setting in settings:
        for key, (spelling, value) in _set_by(setting):
            before, first = seen.get(key, (spelling, value))
            seen[key] = (spelling, value)
            if first == value:
                continue

            if before == spelling:
                notes.append(f"{key} is given twice, {first} and then {value}: the last one counts")
            else:
                what = f"{before} and {spelling} mean the same, but differ"
                yield str(ConfigError(what, found=f"{first} and {value}", expected="one value", fix=f"{key}={value}"))


@cache
def _sections() -> frozenset[str]:
    """Return the dotted names of all sections: for a.b.c, a and a.b."""
    sections = set()
    for key in known_keys():
        section = key.rpartition(".")[0]
        while section:
            sections.add(section)
            section = section.rpartition(".")[0]
    return frozenset(sections)


def _check_key(setting: Setting) -> None:
    """Raise a ConfigError for an unknown key, and for a + before a key or section that is there."""
    keys = known_keys()
    sections = _sections()
    key = setting.key
    if key not in keys and key not in sections and not key.startswith(OPEN_DICTS):
        raise _unknown_key(key)
    if setting.prefix == "+" and key in keys and setting.value[:1] not in ("[", "{"):
        raise ConfigError(f"+{key}: the key exists already", fix=f"write {key}={setting.value} without the +")
    if setting.prefix == "+" and key in sections and not isinstance(setting.content, dict | list):
        found = f"Could not append to config. An item is already at '{key}'."
        raise ConfigError("the configuration cannot be composed", found=found)


def _unknown_key(key: str) -> ConfigError:
    """Build the error, with the key of the same last name, perhaps in another section, else the most similar one."""
    keys = known_keys()
    last = key.lower().rpartition(".")[2]
    same_name = [known for known in keys if known.rpartition(".")[2] == last]

    # A key without its section (`lr`) matches any section; a wrong section must at least be similar.
    cutoff = 0.5 if "." in key else 0.0
    close = difflib.get_close_matches(key.lower(), same_name, n=1, cutoff=cutoff)
    if not close:
        close = difflib.get_close_matches(key.lower(), keys, n=1, cutoff=0.7)

    fix = "apollo-sft train --help lists every key"
    if close:
        fix = f"did you mean {close[0]}?"

    return ConfigError(f"unknown key {key}", fix=fix)


def _compose(settings: list[Setting]) -> dict[str, Any]:
    """Put the values into the tree, and resolve interpolations. Raises: ConfigError.

    This is what `hydra.compose` does with a single yaml. That one composes the settings of Hydra's own launcher and log
    as well, which takes 0.1 s and is thrown away.
    """
    setup_globals()  # Hydra's resolvers, such as ${now:%Y}
    tree = OmegaConf.create(defaults())
    OmegaConf.set_struct(tree, True)  # an unknown key is an error
    try:
        for setting in settings:
            OmegaConf.update(tree, setting.key, setting.content, merge=True, force_add=bool(setting.prefix))
        return OmegaConf.to_container(tree, resolve=True)  # type: ignore[return-value]
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None)
        if isinstance(error, ConfigKeyError) and key:
            raise _unknown_key(key) from error

        what = "the configuration cannot be composed"
        if key:
            what = f"{key} has a value that cannot be used"
        found = re.sub(r"^\w+ raised while resolving interpolation: ", "", str(error).splitlines()[0]).strip('"')
        raise ConfigError(what, found=found) from error


def _explain(key: str, problem: Any) -> str:
    """Return pydantic's problem as one of our messages."""
    kind = problem["type"]
    if kind == "extra_forbidden":
        return str(_unknown_field(key) if "[" in key else _unknown_key(key))

    found = problem["input"]
    if isinstance(found, tuple):
        found = list(found)  # as a user writes it

    expected = problem["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
    if kind in EXPECTED:
        expected = EXPECTED[kind].format(key=key)
    elif kind in ("too_short", "too_long"):
        expected = f"a list of {problem['ctx'].get('min_length', problem['ctx'].get('max_length'))}"
        if key.endswith("].path"):
            expected += " or more"

    fix = None
    if kind == "string_type" and isinstance(found, int | float):
        fix = f"quote a number or a word such as true that is meant as text: \"{key}='…'\""

    return str(ConfigError(f"{key} has a value that cannot be used", found=f"{found!r}", expected=expected, fix=fix))


def _unknown_field(key: str) -> ConfigError:
    kind = Source if key.startswith("data.train_files") else FileSet
    return ConfigError(f"unknown key {key}", expected=f"one of {', '.join(kind.model_fields)}")


def _key_of(problem: Any) -> str:
    """Return the dotted key of a pydantic problem; for a field of a source, data.train_files[1].weight.

    The positions and union branches that pydantic adds are left out: ("optim", "betas", 0) is optim.betas.
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
    """Return the value of a dotted key in a tree; None when it has none."""
    for part in key.split("."):
        if not isinstance(tree, dict) or part not in tree:
            return None
        tree = tree[part]
    return tree

"""Command line -> validated config: Hydra's grammar, our aliases, Hydra's composition, the schema, cross-checks."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ValidationError

from apollo_sft.config.aliases import REFUSED, RENAMED, WITHOUT_EFFECT
from apollo_sft.config.checks import check_combinations
from apollo_sft.config.pending import refuse_pending
from apollo_sft.config.schema import SftConfig
from apollo_sft.errors import ConfigError

YAML_PATH = Path(__file__).parent / "sft_trainer.yaml"
OPEN_DICTS = ("data.apply_chat_template_kwargs.",)
"""Keys below these are the user's own."""


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
    overrides = [_parse(argument) for argument in arguments]
    overrides = [o for o in (_apply_alias(override, notes) for override in overrides) if o is not None]
    _refuse_contradictions(overrides)
    for override in overrides:
        _check_key(override)
    raw = _hydra([override.text for override in overrides])
    config = validate(raw)
    refuse_pending(config)
    check_combinations(config, {override.key for override in overrides}, notes)
    overridden = {override.key: _lookup(raw, override.key) for override in overrides}
    return Composed(config, overridden, notes)


def validate(raw: dict[str, Any]) -> SftConfig:
    """Raises: ConfigError for every unknown key, wrong type and value out of range, all in one message."""
    try:
        return SftConfig.model_validate(raw)
    except ValidationError as error:
        merged = {_key_of(problem): problem for problem in reversed(error.errors())}
        raise ConfigError("\n".join(_explain(problem) for problem in reversed(merged.values()))) from error


def to_yaml(config: SftConfig) -> str:
    """The resolved configuration, as it is saved beside the run."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def known_keys() -> list[str]:
    """Every key of the yaml, leaves only, in order."""
    return list(_leaves(yaml.safe_load(YAML_PATH.read_text(encoding="utf-8")), ""))


@dataclass(frozen=True, slots=True)
class _Override:
    """One parsed `key=value`. `prefix` is '', '+' or '++'."""

    prefix: str
    key: str
    value: str

    @property
    def text(self) -> str:
        return f"{self.prefix}{self.key}={self.value}"


def _parse(argument: str) -> _Override:
    parsed = _parse_or_quote(argument)
    if parsed.is_sweep_override():
        raise ConfigError(
            f"{parsed.key_or_group} has several values",
            found=argument,
            expected="one value; a list is written [a,b]",
        )
    if parsed.is_delete():
        raise ConfigError(f"{argument}: keys cannot be deleted", fix=f"{parsed.key_or_group}=null switches it off")
    prefix = "++" if parsed.is_force_add() else "+" if parsed.is_add() else ""
    value = str(parsed.input_line).split("=", 1)[1]
    return _Override(prefix, str(parsed.key_or_group), value)


def _parse_or_quote(argument: str) -> Override:
    """Parsed by Hydra. A plain value that its lexer refuses (`~/x`, `/a/b=c`) is taken as one quoted string."""
    parser = OverridesParser.create()
    try:
        return parser.parse_override(argument)
    except HydraException as error:
        key, equals, value = argument.partition("=")
        if not equals or not value or value[0] in "{'\"":
            raise _unreadable(argument, error) from error
        quoted = _quote_paths(value) if value.startswith("[") else _quote(value)
        try:
            return parser.parse_override(f"{key}={quoted}")
        except HydraException:
            raise _unreadable(argument, error) from error


def _quote(text: str) -> str:
    escaped = re.sub(r"(\\*)'", r"\1\1\\'", text)
    trailing = len(escaped) - len(escaped.rstrip("\\"))
    return f"'{escaped}{chr(92) * trailing}'"


def _quote_paths(value: str) -> str:
    """Quote the bare elements of a list."""
    inner = value.removeprefix("[").removesuffix("]")
    elements = (element.strip() for element in inner.split(","))
    return "[" + ",".join(e if e[:1] in "'\"" else _quote(e) for e in elements if e) + "]"


def _unreadable(argument: str, error: Exception) -> ConfigError:
    return ConfigError(
        f"the argument {argument!r} cannot be read",
        found=str(error).splitlines()[0],
        expected="key=value, for example data.max_length=2048",
    )


def _apply_alias(override: _Override, notes: list[str]) -> _Override | None:
    key = override.key
    if key in REFUSED:
        raise ConfigError(f"{key} is not a key of this trainer", fix=REFUSED[key])
    if key in WITHOUT_EFFECT:
        notes.append(f"{key} has no effect: {WITHOUT_EFFECT[key]}")
        return None
    if key in RENAMED:
        notes.append(f"{key} is read as {RENAMED[key]}")
        return _Override(override.prefix if override.prefix != "+" else "++", RENAMED[key], override.value)
    if f"{key}.".startswith(OPEN_DICTS):
        return _Override("++", key, override.value)
    return override


def _refuse_contradictions(overrides: list[_Override]) -> None:
    """The same key twice with two values: one of them would be ignored."""
    values: dict[str, str] = {}
    for override in overrides:
        if values.setdefault(override.key, override.value) != override.value:
            spellings = [old for old, new in RENAMED.items() if new == override.key]
            hint = f" ({', '.join(spellings)} means the same)" if spellings else ""
            raise ConfigError(
                f"{override.key} is given twice{hint}",
                found=f"{values[override.key]} and {override.value}",
                expected="one value",
            )


def _check_key(override: _Override) -> None:
    keys = known_keys()
    sections = {key.rsplit(".", depth)[0] for key in keys for depth in range(1, key.count(".") + 1)}
    key = override.key
    if key not in keys and key not in sections and not key.startswith(OPEN_DICTS):
        raise ConfigError(_unknown_key(key))
    default = _lookup(yaml.safe_load(YAML_PATH.read_text(encoding="utf-8")), key)
    if override.prefix == "+" and not isinstance(default, list | dict):
        raise ConfigError(f"+{key}: the key exists already", fix=f"write {key}={override.value} without the +")


def _unknown_key(key: str) -> str:
    keys = known_keys()
    last = key.rsplit(".", 1)[-1]
    same_end = [known for known in keys if known.rsplit(".", 1)[-1] == last]
    close = same_end or difflib.get_close_matches(key, keys, n=1, cutoff=0.7)
    fix = f"did you mean {close[0]}?" if close else "apollo-sft train --help lists every key"
    return str(ConfigError(f"unknown key {key}", fix=fix))


def _hydra(overrides: list[str]) -> dict[str, Any]:
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(YAML_PATH.parent), version_base="1.3"):
            composed = hydra_compose(YAML_PATH.stem, overrides=overrides)
        return OmegaConf.to_container(composed, resolve=True)  # type: ignore[return-value]
    except (HydraException, OmegaConfBaseException) as error:
        cause = error.__cause__ or error
        raise ConfigError("the configuration cannot be composed", found=str(cause).splitlines()[0]) from error


def _explain(problem: Any) -> str:
    key = _key_of(problem)
    if problem["type"] == "extra_forbidden":
        return _unknown_key(key)
    found = problem["input"]
    expected = problem["msg"].removeprefix("Input should be ")
    return str(ConfigError(f"{key} has a value that cannot be used", found=f"{found!r}", expected=expected))


def _key_of(problem: Any) -> str:
    """The dotted key of a pydantic problem, without the positions and union branches that pydantic adds."""
    parts: list[str] = []
    for part in problem["loc"]:
        if isinstance(part, int) or ".".join(parts) in known_keys():
            break
        parts.append(str(part))
    return ".".join(parts)


def _leaves(tree: dict[str, Any], prefix: str) -> Iterator[str]:
    for name, value in tree.items():
        key = f"{prefix}{name}"
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{key}.")
        else:
            yield key


def _lookup(tree: Any, key: str) -> Any:
    for part in key.split("."):
        if not isinstance(tree, dict) or part not in tree:
            return None
        tree = tree[part]
    return tree

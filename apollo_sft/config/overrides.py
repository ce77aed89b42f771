"""One command-line argument -> one `Setting`, in Hydra's grammar, with plain text where Hydra's lexer gives up."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException

from apollo_sft.errors import ConfigError

KEY = re.compile(r"(?:\+\+|\+|~)?[A-Za-z_][\w-]*(?:\.[\w-]+)*", re.ASCII)
JINJA = ("{%", "{{", "{#")
ENVIRONMENT = re.compile(r"\$\{([A-Z_][A-Z0-9_]*)\}")
ELEMENT = re.compile(r"""\s*('(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*"|[^,]*)\s*(?:,|$)""")


@dataclass(frozen=True, slots=True)
class Setting:
    """One `key=value`. `prefix` is '', '+' or '++'; `value` is text that Hydra's grammar reads.

    `content` is what the value means. `spelling` is the key as it was written, before aliases.
    """

    prefix: str
    key: str
    value: str
    content: Any
    spelling: str

    @property
    def text(self) -> str:
        return f"{self.prefix}{self.key}={self.value}"


def leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of everything in a tree that is not a dict, in order. An empty dict is a leaf."""
    for name, value in tree.items():
        key = f"{prefix}{name}"
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{key}.")
        else:
            yield key, value


def parse(argument: str) -> Setting:
    """Raises: ConfigError when it is not one key and one value."""
    _check_form(argument)
    parsed = _parse_or_quote(ENVIRONMENT.sub(r"${oc.env:\1}", argument))
    key = str(parsed.key_or_group)
    if parsed.is_sweep_override():
        raise ConfigError(f"{key} has several values", found=argument, expected="one value; a list is written [a,b]")
    prefix = "++" if parsed.is_force_add() else "+" if parsed.is_add() else ""
    return Setting(prefix, key, str(parsed.input_line).split("=", 1)[1], parsed.value(), key)


def _check_form(argument: str) -> None:
    """What Hydra would say in the words of its lexer. Raises: ConfigError."""
    key, equals, _ = argument.partition("=")
    if argument.startswith("-"):
        fix = "apollo-sft train --nproc N …, or torchrun --nproc_per_node=N …" if "nproc" in argument else None
        raise ConfigError(f"unknown option {argument}", expected="key=value, --help or --cfg job", fix=fix)
    if argument.startswith("~") and KEY.fullmatch(key):
        fix = f"leave it out for its default, or set it: {key[1:]}=…"
        raise ConfigError(f"{argument}: a key cannot be deleted", fix=fix)
    if not equals or not KEY.fullmatch(key):
        found = "no =" if not equals else f"the key {key!r}" if key else "no key"
        raise _unreadable(argument, found, "key=value, such as data.max_length=2048, without spaces around the =")


def _parse_or_quote(argument: str) -> Override:
    """Parsed by Hydra. A plain value that its lexer refuses (`~/x`, `/a/b=c`, jinja) is taken as one quoted text."""
    parser = OverridesParser.create()
    try:
        return parser.parse_override(argument)
    except HydraException as error:
        key, _, value = argument.partition("=")
        quoted = _quoted(value)
        refusal = _unreadable(
            argument, value, "[a,b], {a: 1} or 'text', closed; text with brackets or commas in quotes"
        )
        if quoted is None:
            raise refusal from error
        try:
            return parser.parse_override(f"{key}={quoted}")
        except HydraException:
            raise refusal from error


def _quoted(value: str) -> str | None:
    """The value as Hydra reads it; None for a broken list, dict or quotation, which is not guessed at."""
    if value.startswith("[") and value.endswith("]"):
        return _quote_elements(value[1:-1])
    if not value or (value[0] in "[{'\"" and not value.startswith(JINJA)):
        return None
    return _quote(value)


def _quote(text: str) -> str:
    """Hydra undoes backslashes before a quotation mark and at the end, and only those."""
    escaped = re.sub(r"(\\*)'", r"\1\1\\'", text)
    trailing = len(escaped) - len(escaped.rstrip("\\"))
    return f"'{escaped}{chr(92) * trailing}'"


def _quote_elements(inner: str) -> str | None:
    """A list whose bare elements are texts, such as paths; None when it holds lists or dicts."""
    elements = [match for match in ELEMENT.findall(inner) if match]
    if any(element[0] in "[{" for element in elements):
        return None
    return "[" + ",".join(e if e[0] in "'\"" else _quote(e.rstrip()) for e in elements) + "]"


def _unreadable(argument: str, found: str, expected: str) -> ConfigError:
    return ConfigError(f"the argument {argument!r} cannot be read", found=found, expected=expected)

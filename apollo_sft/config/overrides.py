"""One command-line argument -> one `Setting`, in Hydra's grammar, extended to plain texts that its lexer refuses.

data.max_length=2048         read by Hydra
data.train_files=~/a=b.jsonl    refused by its lexer for the second =, so read again as '~/a=b.jsonl'
data.train_files=[a.jsonl    refused: a broken list is not guessed at
"""

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
    """One `key=value`."""

    prefix: str
    """'', '+' or '++'."""
    key: str
    value: str
    """A text that Hydra's grammar reads."""
    content: Any
    """The value as Python has it."""
    spelling: str
    """The key as the user wrote it, before aliases."""


def leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, value) for everything in a tree that is not a dict, in order. An empty dict is a leaf."""
    for name, value in tree.items():
        key = f"{prefix}{name}"
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{key}.")
        else:
            yield key, value


def parse(argument: str) -> Setting:
    """Parse an argument. Raises: ConfigError when it is not one key and one value."""
    _check_form(argument)
    parsed = _parse_or_quote(ENVIRONMENT.sub(r"${oc.env:\1}", argument))
    key = str(parsed.key_or_group)
    if parsed.is_sweep_override():
        raise ConfigError(f"{key} has several values", found=argument, expected="one value; a list is written [a,b]")

    prefix = ""
    if parsed.is_force_add():
        prefix = "++"
    elif parsed.is_add():
        prefix = "+"

    return Setting(prefix, key, str(parsed.input_line).split("=", 1)[1], parsed.value(), key)


def _check_form(argument: str) -> None:
    """Raise a ConfigError for what Hydra would refuse in the terms of its lexer."""
    key, equals, _ = argument.partition("=")
    if argument.startswith("-"):
        fix = None
        if "nproc" in argument:
            fix = "apollo-sft train --nproc N …, or torchrun --nproc_per_node=N …"
        raise ConfigError(f"unknown option {argument}", expected="key=value, --help or --cfg job", fix=fix)

    if argument.startswith("~") and KEY.fullmatch(key):
        fix = f"leave it out for its default, or set it: {key[1:]}=…"
        raise ConfigError(f"{argument}: a key cannot be deleted", fix=fix)

    if not equals or not KEY.fullmatch(key):
        found = f"the key {key!r}"
        if not equals:
            found = "no ="
        elif not key:
            found = "no key"
        raise _unreadable(argument, found, "key=value, such as data.max_length=2048, without spaces around the =")


def _parse_or_quote(argument: str) -> Override:
    """Parse by Hydra. A plain value that its lexer refuses (`~/x`, `/a/b=c`, jinja) is read as one quoted text."""
    parser = OverridesParser.create()
    try:
        return parser.parse_override(argument)
    except HydraException as error:
        key, _, value = argument.partition("=")
        expected = "[a,b], {a: 1} or 'text', closed; text with brackets or commas in quotes"
        refusal = _unreadable(argument, value, expected)
        quoted = _quoted(value)
        if quoted is None:
            raise refusal from error
        try:
            return parser.parse_override(f"{key}={quoted}")
        except HydraException:
            raise refusal from error


def _quoted(value: str) -> str | None:
    """Return the value as Hydra reads it; None for a broken list, dict or quotation, which is not guessed at."""
    if value.startswith("[") and value.endswith("]"):
        return _quote_elements(value[1:-1])
    if not value or (value[0] in "[{'\"" and not value.startswith(JINJA)):
        return None
    return _quote(value)


def _quote(text: str) -> str:
    """Return the text in quotation marks."""
    # Hydra undoes backslashes before a quotation mark and at the end, and only those.
    escaped = re.sub(r"(\\*)'", r"\1\1\\'", text)
    trailing = len(escaped) - len(escaped.rstrip("\\"))
    return f"'{escaped}{chr(92) * trailing}'"


def _quote_elements(inner: str) -> str | None:
    """Return a list whose bare elements, such as paths, are quoted; None when it holds lists or dicts."""
    elements = []
    for element in ELEMENT.findall(inner):
        if not element:
            continue
        if element[0] in "[{":
            return None
        is_quoted = element[0] in "'\""
        elements.append(element if is_quoted else _quote(element.rstrip()))
    return f"[{','.join(elements)}]"


def _unreadable(argument: str, found: str, expected: str) -> ConfigError:
    return ConfigError(f"the argument {argument!r} cannot be read", found=found, expected=expected)

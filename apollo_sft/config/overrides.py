"""One command-line argument -> one `Setting`, in Hydra's grammar, with plain text where Hydra's lexer gives up."""

from __future__ import annotations

import re
from dataclasses import dataclass

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException

from apollo_sft.errors import ConfigError

JINJA = ("{%", "{{", "{#")
ENVIRONMENT = re.compile(r"\$\{([A-Z_][A-Z0-9_]*)\}")
ELEMENT = re.compile(r"""\s*('(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*"|[^,]*)\s*(?:,|$)""")


@dataclass(frozen=True, slots=True)
class Setting:
    """One `key=value`. `prefix` is '', '+' or '++'; `value` is text that Hydra's grammar reads."""

    prefix: str
    key: str
    value: str

    @property
    def text(self) -> str:
        return f"{self.prefix}{self.key}={self.value}"


def parse(argument: str) -> Setting:
    """Raises: ConfigError when it is not one key and one value."""
    parsed = _parse_or_quote(ENVIRONMENT.sub(r"${oc.env:\1}", argument))
    key = str(parsed.key_or_group)
    if not key or parsed.package is not None:
        raise _unreadable(argument, "no key" if not key else f"@{parsed.package}")
    if parsed.is_delete():
        fix = f"leave it out for its default; {key}=null switches an optional key off"
        raise ConfigError(f"{argument}: a key cannot be deleted", fix=fix)
    if parsed.is_sweep_override():
        raise ConfigError(f"{key} has several values", found=argument, expected="one value; a list is written [a,b]")
    prefix = "++" if parsed.is_force_add() else "+" if parsed.is_add() else ""
    return Setting(prefix, key, str(parsed.input_line).split("=", 1)[1])


def _parse_or_quote(argument: str) -> Override:
    """Parsed by Hydra. A plain value that its lexer refuses (`~/x`, `/a/b=c`, jinja) is taken as one quoted text."""
    parser = OverridesParser.create()
    try:
        return parser.parse_override(argument)
    except HydraException as error:
        key, _, value = argument.partition("=")
        quoted = _quoted(value)
        if quoted is None:
            raise _unreadable(argument, str(error).splitlines()[0]) from error
        try:
            return parser.parse_override(f"{key}={quoted}")
        except HydraException:
            raise _unreadable(argument, str(error).splitlines()[0]) from error


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


def _unreadable(argument: str, found: str) -> ConfigError:
    return ConfigError(
        f"the argument {argument!r} cannot be read",
        found=found,
        expected="key=value, for example data.max_length=2048; a text with brackets or commas in quotation marks",
    )

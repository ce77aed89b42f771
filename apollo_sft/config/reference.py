"""The part of docs/configuration.md that is made from the schema and the table of spellings.

`python -m apollo_sft.config.reference docs/configuration.md apollo_sft/config/sft_trainer.yaml` writes both anew: the
whole yaml, and of the page what stands between two marks.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from apollo_sft.config.aliases import REFUSED, REFUSED_SECTIONS, RENAMED, WITHOUT_EFFECT
from apollo_sft.config.checks import LOGGERS
from apollo_sft.config.keys import written
from apollo_sft.config.schema import KEYS, SftConfig
from apollo_sft.config.yaml_text import entries, yaml_text
from apollo_sft.errors import ConfigError

BEGIN = "<!-- Made by `make docs-reference` from the schema and the aliases. Do not edit from here on. -->"
END = "<!-- End of what is made. -->"
TYPES = {"integer": "whole number", "number": "number", "boolean": "true or false", "string": "text", "object": "dict"}
CHOICES = {"trainer.logger": LOGGERS}
"""What the schema leaves to the cross-checks."""
LINK = re.compile(r"\bdocs/(\w+\.md)\b")
LITERAL = re.compile(
    r"(?P<kept>`[^`]*`|\[[^\]]*\]\([^)]*\))"  # what is Markdown already
    r"|<\|.*?\|>"  # control tokens
    r"|\{[^}]*\}|\[[^\])]*\]"  # dicts and lists
    r"|'[^']*[/*][^']*'"  # quoted globs
    r"|previous-<time>/"
    r"|apollo-sft [a-z]+(?: --[a-z]+)?"
    r"|[~$./\w*-]*[_/*=~][\w./*=+-]*\w/?|\b[a-z]+/(?!\w)"  # names with _ / * and assignments; folders
    r"|\b[a-z]\w*(?:\.[a-z]\w*)+"  # keys and files
    r"|\b(?:null|true|false)\b"
)


def example(key: str) -> str:
    """Overrides that set the key, as they are given on a command line.

    Raises: ConfigError where nobody has written one.
    """
    own = f"{key}={_example_value(key)}"
    quoted = f'"{own}"' if " " in own else own
    needed = needed_by(key)
    return quoted if needed is None else f"{quoted} {needed}"


def needed_by(key: str) -> str | None:
    """The override that the example of a key needs, without which it would be refused or change nothing."""
    facts = KEYS[key]
    remedy = facts.unused.remedy if facts.unused is not None else None
    return facts.needs or remedy


def kind(key: str) -> str:
    """Type and range or choices, for a person."""
    choices = CHOICES.get(key)
    return f"any of {_coded(choices)}" if choices else _spoken(_shape(key))


def generated() -> str:
    """The reference in Markdown: every key, then the other spellings."""
    return "\n\n".join(["## Every key", *_reference(), *_spellings()])


def renewed(page: str) -> str:
    """The page with the made part as it should be. Raises: ConfigError when the page lacks the marks."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ConfigError("the page has no place for the reference", expected=f"a line {BEGIN} and later a line {END}")
    return f"{before}{BEGIN}\n\n{generated()}\n\n{END}{after}"


def _example_value(key: str) -> str:
    given, shape = KEYS[key].example, _shape(key)
    if given is not None:
        return given
    default = shape.get("default")
    if shape.get("type") == "boolean":
        return written(not default)
    for choice in shape.get("enum", ()):
        if choice != default:
            return str(choice)
    raise ConfigError(f"{key} has no example for the reference", fix='add one to its Key: example="…"')


def _reference() -> Iterator[str]:
    top = None
    for entry in entries():
        if entry.top != top:
            top = entry.top
            yield f"### `{top}`\n\n{_marked(entry.meaning)}" if top else "### Without a section"
        if entry.default is None:
            if "." in entry.key:
                yield f"#### `{entry.key}`\n\n*A section.* {_marked(entry.meaning)}"
            continue
        facts = f"{kind(entry.key)} · default `{entry.default}`"
        use = f"```\n{example(entry.key)}\n```"
        meaning = _marked(entry.meaning, CHOICES.get(entry.key) or _shape(entry.key).get("enum", ()))
        yield f"#### `{entry.key}`\n\n*{facts}*\n\n{meaning}\n\n{use}"


def _spellings() -> Iterator[str]:
    yield "## Other spellings"
    yield "Other names of a key, as verl and AlphaApollo spell it, are read as ours. The start of the run says so:"
    yield _table("given", "read as", {given: f"`{ours}`" for given, ours in RENAMED.items()})
    yield "Two spellings of one key that differ are refused. These are accepted and change nothing:"
    yield _table("given", "why", {name: _marked(reason) for name, reason in WITHOUT_EFFECT.items()})
    yield "These are refused, because what they ask for is said by another key or does not exist here:"
    sections = {f"{name}.*": reason for name, reason in REFUSED_SECTIONS.items()}
    yield _table("given", "what to do", {name: _marked(reason) for name, reason in (REFUSED | sections).items()})
    yield "[Coming from verl and AlphaApollo](from_verl.md) says key by key what is the same."


def _table(first: str, second: str, rows: Mapping[str, str]) -> str:
    return "\n".join([f"| {first} | {second} |", "| --- | --- |", *(f"| `{a}` | {b} |" for a, b in rows.items())])


def _marked(comment: str, choices: Sequence[str] = ()) -> str:
    """A meaning as Markdown: links to other pages, everything that is code as code."""
    for choice in choices:
        word = rf"(?<!`)\b{re.escape(choice)}\b"
        explained = rf"{word}(?= \()"
        comment = re.sub(explained if re.search(explained, comment) else word, f"`{choice}`", comment)
    linked = LINK.sub(r"[\1](\1)", comment)
    return LITERAL.sub(lambda found: found[0] if found["kept"] else f"`{found[0]}`", linked)


def _coded(values: Iterable[object]) -> str:
    return ", ".join(f"`{value}`" for value in values)


def _shape(key: str) -> dict[str, Any]:
    """What the schema says of a key, as JSON schema."""
    schema = _whole_shape()
    shape = schema
    for part in key.split("."):
        shape = shape["properties"][part]
        if "$ref" in shape:
            shape = schema["$defs"][shape["$ref"].rpartition("/")[2]]
    return shape


@cache
def _whole_shape() -> dict[str, Any]:
    return SftConfig.model_json_schema()


def _spoken(shape: dict[str, Any]) -> str:
    if "description" in shape:
        return str(shape["description"]).replace("null", "`null`")
    if "anyOf" in shape:
        return ", or ".join(_spoken(each) for each in shape["anyOf"])
    if "enum" in shape or "const" in shape:
        return _coded(shape.get("enum", [shape.get("const")])).replace(", ", " or ")
    if shape["type"] == "array":
        count = f" of {shape['minItems']}" if shape.get("minItems", 0) == shape.get("maxItems") else ""
        return f"list{count}: {_spoken(shape['items'])}"
    return {"null": "`null`"}.get(shape["type"]) or f"{TYPES[shape['type']]}{_range(shape)}"


def _range(shape: dict[str, Any]) -> str:
    signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    bounds = [f"{sign} {_number(shape[name])}" for name, sign in signs.items() if name in shape]
    return f" {' and '.join(bounds)}" if bounds else ""


def _number(value: float) -> str:
    power = value.bit_length() - 1 if isinstance(value, int) and value > 0 else 0
    return f"2^{power}" if power > 20 and value == 2**power else f"{value:g}"


def main(arguments: list[str]) -> None:
    """Write the made part of the page anew, and the yaml. Arguments: the paths of both."""
    page, in_yaml = map(Path, arguments)
    page.write_text(renewed(page.read_text(encoding="utf-8")), encoding="utf-8")
    in_yaml.write_text(yaml_text(), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])

"""The part of docs/configuration.md that is generated from the schema and the table of spellings.

`python -m apollo_sft.config.reference docs/configuration.md apollo_sft/config/sft_trainer.yaml` rewrites both: the
whole yaml, and the part of the page between two marks.
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
"""The choices of keys that the schema leaves to the cross-checks."""
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
    """Return the overrides that set the key, as they are given on a command line.

    Raises: ConfigError where the key has no example.
    """
    text = f"{key}={_example_value(key)}"
    if " " in text:
        text = f'"{text}"'

    needed = needed_by(key)
    if needed is not None:
        text += f" {needed}"
    return text


def needed_by(key: str) -> str | None:
    """Return the override that the example of a key needs, without which it would be refused or change nothing."""
    facts = KEYS[key]
    if facts.needs or facts.unused is None:
        return facts.needs
    return facts.unused.remedy


def kind(key: str) -> str:
    """Describe type and range or choices, for a person."""
    choices = CHOICES.get(key)
    if choices:
        return f"any of {_coded(choices)}"
    return _described(_shape(key))


def generated() -> str:
    """Return the reference in Markdown: every key, then the other spellings."""
    return "\n\n".join(["## Every key", *_reference(), *_spellings()])


def renewed(page: str) -> str:
    """Return the page with its generated part renewed. Raises: ConfigError when the page lacks the marks."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ConfigError("the page has no place for the reference", expected=f"a line {BEGIN} and later a line {END}")
    return f"{before}{BEGIN}\n\n{generated()}\n\n{END}{after}"


def _example_value(key: str) -> str:
    """Return the example that the key declares, else another choice than the default."""
    given = KEYS[key].example
    if given is not None:
        return given

    shape = _shape(key)
    default = shape.get("default")
    if shape.get("type") == "boolean":
        return written(not default)

    for choice in shape.get("enum", ()):
        if choice != default:
            return str(choice)

    raise ConfigError(f"{key} has no example for the reference", fix='add one to its Key: example="…"')


def _reference() -> Iterator[str]:
    """Yield the paragraphs of every section and key."""
    top = None
    for entry in entries():
        if entry.top != top:
            top = entry.top
            if top:
                yield f"### `{top}`\n\n{_marked(entry.meaning)}"
            else:
                yield "### Without a section"

        # A section: an outermost one has its heading already.
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
    yield "Other names of a key, as verl and AlphaApollo spell it, are read as ours, with a note when the run starts:"
    yield _table("given", "read as", {given: f"`{ours}`" for given, ours in RENAMED.items()})
    yield "Two spellings of one key that differ are refused. These are accepted and change nothing:"
    yield _table("given", "why", {name: _marked(reason) for name, reason in WITHOUT_EFFECT.items()})
    yield "These are refused, because another key has their function, or because it does not exist here:"
    sections = {f"{name}.*": reason for name, reason in REFUSED_SECTIONS.items()}
    yield _table("given", "what to do", {name: _marked(reason) for name, reason in (REFUSED | sections).items()})
    yield "[Coming from verl and AlphaApollo](from_verl.md) compares them key by key."


def _table(first: str, second: str, rows: Mapping[str, str]) -> str:
    return "\n".join([f"| {first} | {second} |", "| --- | --- |", *(f"| `{a}` | {b} |" for a, b in rows.items())])


def _marked(comment: str, choices: Sequence[str] = ()) -> str:
    """Return a meaning as Markdown: links to other pages, and code in backticks."""
    for choice in choices:
        word = rf"(?<!`)\b{re.escape(choice)}\b"
        # A choice may be an ordinary word, too ("left", "all"): where it is explained in brackets, only that place is.
        explained = rf"{word}(?= \()"
        pattern = explained if re.search(explained, comment) else word
        comment = re.sub(pattern, f"`{choice}`", comment)

    linked = LINK.sub(r"[\1](\1)", comment)
    return LITERAL.sub(lambda found: found[0] if found["kept"] else f"`{found[0]}`", linked)


def _coded(values: Iterable[object]) -> str:
    return ", ".join(f"`{value}`" for value in values)


def _shape(key: str) -> dict[str, Any]:
    """Return the JSON schema of a key."""
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


def _described(shape: dict[str, Any]) -> str:
    """Describe a JSON schema in words. A description that the schema has comes first."""
    if "description" in shape:
        return str(shape["description"]).replace("null", "`null`")
    if "anyOf" in shape:
        return ", or ".join(_described(each) for each in shape["anyOf"])
    if "enum" in shape or "const" in shape:
        return _coded(shape.get("enum", [shape.get("const")])).replace(", ", " or ")

    if shape["type"] == "array":
        count = ""
        if shape.get("minItems", 0) == shape.get("maxItems"):
            count = f" of {shape['minItems']}"
        return f"list{count}: {_described(shape['items'])}"

    if shape["type"] == "null":
        return "`null`"
    return f"{TYPES[shape['type']]}{_range(shape)}"


def _range(shape: dict[str, Any]) -> str:
    signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    bounds = [f"{sign} {_number(shape[name])}" for name, sign in signs.items() if name in shape]
    if not bounds:
        return ""
    return f" {' and '.join(bounds)}"


def _number(value: float) -> str:
    """Write a bound; a large power of two as such: 2^63."""
    if isinstance(value, int) and value > 0:
        power = value.bit_length() - 1
        if power > 20 and value == 2**power:
            return f"2^{power}"
    return f"{value:g}"


def main(arguments: list[str]) -> None:
    """Rewrite the generated part of the page, and the yaml. Arguments: the paths of both."""
    page, in_yaml = map(Path, arguments)
    page.write_text(renewed(page.read_text(encoding="utf-8")), encoding="utf-8")
    in_yaml.write_text(yaml_text(), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])

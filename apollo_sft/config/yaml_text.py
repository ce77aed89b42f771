"""The text of sft_trainer.yaml, generated from the schema: every key with its default, below its docstring."""

from __future__ import annotations

import ast
import inspect
import json
import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any

import yaml
from pydantic.fields import FieldInfo

from apollo_sft.config.keys import Section, fields_below, section_of, written
from apollo_sft.config.schema import KEYS, SftConfig
from apollo_sft.errors import ConfigError

HEADER = """\
# Every key of apollo-sft, its default and its meaning. Set keys on the command line: data.max_length=2048
#   lists: data.train_files=[a.parquet,b.parquet]   dicts: data.apply_chat_template_kwargs={enable_thinking: false}
#   null switches an optional key off. `~` and $HOME are expanded in paths.
#   A number that is meant as text, for the shell: "data.prompt_key='1'"
# This text is generated from config/schema.py by `make docs-reference`. Changes belong there.
"""
WIDTH = 120


@dataclass(frozen=True, slots=True)
class Entry:
    """A key or a section."""

    key: str
    meaning: str
    default: str | None
    """The default in the form of the yaml; None for a section."""

    @property
    def top(self) -> str:
        """Return the outermost section that it belongs to; "" for a key without a section."""
        if "." not in self.key and self.default is not None:
            return ""
        return self.key.partition(".")[0]


def entries() -> Iterator[Entry]:
    """Yield keys and sections in their order. Raises: ConfigError for one without a docstring."""
    for name, field in fields_below(SftConfig):
        section = section_of(field)
        if section is None:
            yield Entry(name, docstring_of(name), _default(name, field))
        else:
            yield Entry(name, _one_line(section.__doc__, name), None)


def docstring_of(key: str) -> str:
    """Read the docstring of a key, in one line. Raises: ConfigError when it has none."""
    *path, name = key.split(".")
    section: type[Section] | None = SftConfig
    for part in path:
        assert section is not None, f"{key} is a key of the schema"
        section = section_of(section.model_fields[part])

    assert section is not None, f"{key} is a key of the schema"
    return _one_line(_docstrings(section).get(name), key)


def yaml_text() -> str:
    """Return the whole file."""
    lines = [HEADER.rstrip("\n")]
    top = None
    for entry in entries():
        if entry.top != top:
            lines.append("")

        top = entry.top

        *path, name = entry.key.split(".")
        indent = "  " * len(path)
        lines += textwrap.wrap(
            entry.meaning,
            WIDTH,
            initial_indent=f"{indent}# ",
            subsequent_indent=f"{indent}# ",
            break_long_words=False,
            break_on_hyphens=False,
        )
        lines.append(f"{indent}{name}: {entry.default or ''}".rstrip())

    return "\n".join(lines) + "\n"


@cache
def _docstrings(section: type[Section]) -> dict[str, str]:
    """Return the text below each field, by the name of the field."""
    # From the source: Python does not keep a text that is no docstring of a class or a function.
    tree = ast.parse(textwrap.dedent(inspect.getsource(section)))
    found = {}
    for statement, below in pairwise(getattr(tree.body[0], "body", [])):
        match statement, below:
            case (ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text)))):
                found[name] = text
    return found


def _one_line(text: str | None, key: str) -> str:
    if not text:
        raise ConfigError(
            f"{key} has no docstring",
            expected="what it means, in plain words: below the field, or of a section at the start of its class",
            fix="write it in config/sections/, then make docs-reference",
        )
    return " ".join(text.split())


def _default(key: str, field: FieldInfo) -> str:
    return KEYS[key].written or _in_yaml(field.get_default(call_default_factory=True))


def _in_yaml(value: Any) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(map(_in_yaml, value))}]"
    if isinstance(value, float):
        return re.sub(r"e([+-])0+", r"e\1", repr(value))  # 1e-5, as people write it

    if isinstance(value, str):
        is_plain = yaml.safe_load(value) == value
        return value if is_plain else json.dumps(value)

    if isinstance(value, dict):
        return json.dumps(value)
    return written(value)

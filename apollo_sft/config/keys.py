"""What a key of the configuration says of itself, and the base class of the sections, which demands that it does.

A key stands in one place, as a field of a section: its type and range, its default, a `Key`, and below it a docstring.
What the rest of the program has to know about keys is read from there.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

from pydantic import BaseModel, ConfigDict
from pydantic.fields import FieldInfo


class Changes(enum.Flag):
    """What is another one after the value of a key has changed. A key may change several of them."""

    NOTHING = 0
    """Nothing of the training: where files lie, what is shown, how the model is validated, saved and handed over."""
    TOKENS = enum.auto()
    """The samples: their tokens, and which of these are trained."""
    ORDER = enum.auto()
    """Which samples a step holds."""
    MODEL = enum.auto()
    """The weights: which ones are trained, what they start from, and how a step updates them."""
    NUMERICS = enum.auto()
    """The precision or the formulas of a step: numbers differ by more than the order of a sum."""
    LAYOUT = enum.auto()
    """How the same step is divided and computed: over processes, in which pieces, by which kernels, on which device."""
    LENGTH = enum.auto()
    """After how many steps the run ends."""


NOTHING = Changes.NOTHING
TOKENS = Changes.TOKENS
ORDER = Changes.ORDER
MODEL = Changes.MODEL
NUMERICS = Changes.NUMERICS
LAYOUT = Changes.LAYOUT
LENGTH = Changes.LENGTH

UNSET: Any = object()
AS_SET: Any = object()
"""For `Key.neutral`: `apollo-sft verify` leaves the key at the user's value."""


@dataclass(frozen=True, slots=True)
class Unused:
    """A condition under which a key has no effect. `when` ends the sentence "KEY has no effect …".

    `holds` tells whether a configuration fulfils it. `remedy`: an override that ends it, where the defaults fulfil it.
    """

    when: str
    holds: Callable[[Any], bool]
    remedy: str | None = None


def unused_without(override: str) -> Unused:
    """Make the condition of a key that needs `override`, written KEY=VALUE. The defaults must have another value."""
    key, _, value = override.partition("=")
    return Unused(f"without {override}", lambda config: written(attrgetter(key)(config)) != value, override)


def unused_with(override: str, remedy: str | None = None) -> Unused:
    """Make the condition of a key that is of no use with `override`, written KEY=VALUE."""
    key, _, value = override.partition("=")
    return Unused(f"with {override}", lambda config: written(attrgetter(key)(config)) == value, remedy)


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """Facts about one key, beside its type."""

    changes: Changes

    example: str | None = None
    """A value that a user might give. A key with true and false, or with choices, needs none: another one is taken."""
    needs: str | None = None
    """An override that the example needs: without it the value would be refused or would change nothing."""
    unused: Unused | None = None
    """When the key has no effect. That is said, not refused."""

    per_host: bool = False
    """It says where something lies on a host. Hosts may differ in it; what lies there is compared."""
    by_content: bool = False
    """A run that goes on compares what the value leads to, not the value."""
    stored_as: str | None = None
    """Of a key that changes tokens: the part of a store's key that speaks for it. None: its value stands there."""

    neutral: Any = UNSET
    """Of a key that changes the layout: its value in the plainest one, or AS_SET. `apollo-sft verify` starts there."""
    written: str | None = None
    """The default as the yaml has it, where a user would write it in another way than the schema."""


class Frozen(BaseModel):
    """Strictly typed values that cannot be changed."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, validate_default=True)


class Section(Frozen):
    """A part of the configuration. Its fields are keys or sections.

    Raises: TypeError, when the class is made, for a key that does not say what it changes or has no default.
    """

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        super().__pydantic_init_subclass__(**kwargs)
        for name, field in cls.model_fields.items():
            if section_of(field) is None:
                _check_complete(f"{cls.__name__}.{name}", field)


def section_of(field: FieldInfo) -> type[Section] | None:
    """The section that a field holds; None when the field is a key."""
    kind = field.annotation
    return kind if isinstance(kind, type) and issubclass(kind, Section) else None


def keys_in(section: type[Section]) -> dict[str, Key]:
    """Collect the keys of a section by their own names, without those of the sections below it."""
    fields = section.model_fields.items()
    return {name: _key_of(field) for name, field in fields if section_of(field) is None}


def fields_below(section: type[Section], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """(dotted name, field) of everything in a section, sections included, in order."""
    for name, field in section.model_fields.items():
        yield f"{prefix}{name}", field
        inner = section_of(field)
        if inner is not None:
            yield from fields_below(inner, f"{prefix}{name}.")


def keys_below(section: type[Section]) -> dict[str, Key]:
    """Collect all keys in a section and below by their dotted names, in order."""
    return {name: _key_of(field) for name, field in fields_below(section) if section_of(field) is None}


def written(value: Any) -> str:
    """Spell a single value as on a command line."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)


def _key_of(field: FieldInfo) -> Key:
    return next(item for item in field.metadata if isinstance(item, Key))


def _check_complete(name: str, field: FieldInfo) -> None:
    own = name.rpartition(".")[2]
    if not any(isinstance(item, Key) for item in field.metadata):
        choices = ", ".join(str(choice.name) for choice in (NOTHING, *Changes))
        raise TypeError(
            f"the key {name} does not say what a change of its value changes\n"
            f'  to do:    write {own}: Annotated[…, Key(changes=…, example="…")] = …, and below it a docstring\n'
            f"  changes:  one of {choices}, or several as A | B; class Changes in config/keys.py says what they mean"
        )
    if field.is_required():
        raise TypeError(f"the key {name} has no default\n  to do:    write {own}: Annotated[…, Key(…)] = its default")

    key = _key_of(field)
    if LAYOUT in key.changes and key.neutral is UNSET:
        raise TypeError(
            f"the key {name} changes the layout, but does not say with which value apollo-sft verify starts\n"
            "  to do:    Key(…, neutral=its value in the plainest layout), or neutral=AS_SET for the user's own value"
        )
    if LAYOUT not in key.changes and key.neutral is not UNSET:
        raise TypeError(f"the key {name} has neutral=…, which is for keys that change the layout")
    if TOKENS not in key.changes and key.stored_as is not None:
        raise TypeError(f"the key {name} has stored_as=…, which is for keys that change tokens")

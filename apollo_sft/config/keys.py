"""The facts that every key of the configuration declares, and the base class of the sections, which requires them.

A key is defined in one place, as a field of a section: its type and range, its default, a `Key`, and below it a
docstring. The rest of the program reads everything about keys from there. For example:

    lr: Annotated[float, Field(gt=0), Key(changes=MODEL, example="2e-5")] = 1e-5
    \"\"\"Peak learning rate, above 0.\"\"\"
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
    """The parts of a training that a change of a key's value changes. A key may change several of them."""

    NOTHING = 0
    """Nothing of the training: the places of files, what is shown, how the model is validated, saved and exported."""
    TOKENS = enum.auto()
    """The samples: their tokens, and which of these are trained."""
    ORDER = enum.auto()
    """Which samples a step holds."""
    MODEL = enum.auto()
    """The weights: which ones are trained, what they start from, and how a step updates them."""
    NUMERICS = enum.auto()
    """The precision or the formulas of a step: numbers differ by more than the order of a sum."""
    LAYOUT = enum.auto()
    """The way in which the same step is divided and computed: processes, micro-batches, kernels, devices."""
    LENGTH = enum.auto()
    """The number of steps of the run."""


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
    """A condition under which a key has no effect."""

    when: str
    """The end of the sentence "KEY has no effect …"."""
    holds: Callable[[Any], bool]
    """Returns whether a configuration fulfils it."""
    remedy: str | None = None
    """An override that ends it, where the defaults fulfil it."""


def unused_without(override: str) -> Unused:
    """Build the condition of a key that needs `override`, written KEY=VALUE. The defaults must have another value."""
    key, _, value = override.partition("=")
    return Unused(f"without {override}", lambda config: written(attrgetter(key)(config)) != value, override)


def unused_with(override: str, remedy: str | None = None) -> Unused:
    """Build the condition of a key that has no effect with `override`, written KEY=VALUE."""
    key, _, value = override.partition("=")
    return Unused(f"with {override}", lambda config: written(attrgetter(key)(config)) == value, remedy)


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """Facts about one key, beside its type."""

    changes: Changes

    example: str | None = None
    """A value that a user might give. A key of true and false, or of choices, needs none: another choice is taken."""
    needs: str | None = None
    """An override that the example needs: without it the value would be refused or would change nothing."""
    unused: Unused | None = None
    """The condition under which the key has no effect. The user gets a note then; it is not refused."""

    per_host: bool = False
    """It is a place on a host. Hosts may differ in it; the contents are compared."""
    by_content: bool = False
    """For a resumed run the contents that the value leads to are compared, not the value."""
    stored_as: str | None = None
    """For a key that changes tokens: the part of a store's key that represents it. None: its value is there."""

    neutral: Any = UNSET
    """For a key that changes the layout: its value in the plainest layout, with which `apollo-sft verify` starts, or
    AS_SET."""
    written: str | None = None
    """The default in the yaml, where a user would write it in another way than the schema."""


class Frozen(BaseModel):
    """Strictly typed values that cannot be changed."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, validate_default=True)


class Section(Frozen):
    """A part of the configuration. Its fields are keys or sections.

    Raises: TypeError, when the class is created, for a key that does not declare what it changes, or has no default.
    """

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        super().__pydantic_init_subclass__(**kwargs)
        for name, field in cls.model_fields.items():
            if section_of(field) is None:
                _check_complete(f"{cls.__name__}.{name}", field)


def section_of(field: FieldInfo) -> type[Section] | None:
    """Return the section that a field holds; None when the field is a key."""
    kind = field.annotation
    if isinstance(kind, type) and issubclass(kind, Section):
        return kind
    return None


def keys_in(section: type[Section]) -> dict[str, Key]:
    """Collect the keys of a section by their own names, without those of the sections below it."""
    fields = section.model_fields.items()
    return {name: _key_of(field) for name, field in fields if section_of(field) is None}


def fields_below(section: type[Section], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Yield (dotted name, field) for everything in a section, sections included, in order."""
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
    """Raise a TypeError for an incomplete key, with what to write, for the person who adds it."""
    own = name.rpartition(".")[2]
    if not any(isinstance(item, Key) for item in field.metadata):
        choices = ", ".join(str(choice.name) for choice in (NOTHING, *Changes))
        raise TypeError(
            f"the key {name} does not declare what a change of its value changes\n"
            f'  to do:    write {own}: Annotated[…, Key(changes=…, example="…")] = …, and below it a docstring\n'
            f"  changes:  one of {choices}, or several as A | B; class Changes in config/keys.py explains them"
        )

    if field.is_required():
        raise TypeError(f"the key {name} has no default\n  to do:    write {own}: Annotated[…, Key(…)] = its default")

    key = _key_of(field)
    if LAYOUT in key.changes and key.neutral is UNSET:
        raise TypeError(
            f"the key {name} changes the layout, but does not declare with which value apollo-sft verify starts\n"
            "  to do:    Key(…, neutral=its value in the plainest layout), or neutral=AS_SET for the user's own value"
        )
    if LAYOUT not in key.changes and key.neutral is not UNSET:
        raise TypeError(f"the key {name} has neutral=…, which is for keys that change the layout")
    if TOKENS not in key.changes and key.stored_as is not None:
        raise TypeError(f"the key {name} has stored_as=…, which is for keys that change tokens")

"""Validation shared by the config dataclasses: errors name field, value and what is allowed."""

from __future__ import annotations

import dataclasses
import difflib
import math
import numbers
import types
import typing
from collections.abc import Mapping
from typing import Any

LARGEST = 2**30  # with room above it in 32 bits


def check(owner: str, **fields: tuple[Any, bool, str]) -> None:
    """Raises ValueError for the first field whose test fails: field=(value, test, allowed)."""
    for name, (value, fine, allowed) in fields.items():
        if not fine:
            raise ValueError(f"{owner}: {name}={value!r}; allowed: {allowed}")


def one_of(value: Any, *allowed: Any) -> tuple[Any, bool, str]:
    """A field's test: one of a few values."""
    return value, value in allowed, ", ".join(str(a) for a in allowed)


def at_least(value: Any, low: float) -> tuple[Any, bool, str]:
    """A field's test: a finite number not below `low`."""
    return value, is_number(value) and low <= value < math.inf, f"a number >= {low}"


def between(value: Any, low: float, high: float) -> tuple[Any, bool, str]:
    """A field's test: a number from `low` to `high`."""
    return value, is_number(value) and low <= value <= high, f"a number from {low} to {high}"


def integer_at_least(value: Any, low: int) -> tuple[Any, bool, str]:
    """A field's test: an integer not below `low`, with room above it in 32 bits."""
    is_integer = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if is_integer and value > LARGEST:
        return value, False, f"an integer up to {LARGEST}"
    return value, is_integer and low <= value, f"an integer >= {low}"


def is_number(value: Any) -> bool:
    """No text, no list; True is none either."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def fits(value: Any, hint: Any) -> bool:
    """Whether a value has the type of a field's annotation; an int is a float, a bool no int."""
    if hint is Any:
        return True
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, option) for option in typing.get_args(hint))
    if hint in (int, float):
        return isinstance(value, (int, hint)) and not isinstance(value, bool)
    if origin is tuple and isinstance(value, tuple):
        kinds = typing.get_args(hint)
        if kinds[-1] is not ...:
            return len(value) == len(kinds) and all(map(fits, value, kinds))
        return all(fits(element, kinds[0]) for element in value)
    return isinstance(value, origin or hint)


def check_types(cls: type, values: Mapping[str, Any], owner: str) -> None:
    """Raises ValueError for an unknown field of a dataclass, or a value of another type.

    The nearest known name is told.
    """
    hints = typing.get_type_hints(cls)
    fields = [f.name for f in dataclasses.fields(cls)]
    for name, value in values.items():
        if name not in fields:
            near = difflib.get_close_matches(name, fields, 1)
            hint = f" (did you mean {near[0]}?)" if near else ""
            known = ", ".join(fields) or "none"
            raise ValueError(f"{owner}: unknown field {name!r}{hint}; allowed: {known}")
        if not fits(value, hints[name]):
            raise ValueError(f"{owner}: {name}={value!r}; allowed: {_shown(hints[name])}")


def _shown(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) else str(hint)


def build(cls: type, values: Mapping[str, Any], owner: str) -> Any:
    """A dataclass from a mapping; nested mappings become those in `cls.PARTS`.

    A part that may be None is None while its first field is: so a config can show all fields of
    such a part, and the command line can switch it on by setting that one.

    Raises:
        ValueError: an unknown field, with the nearest known name; fields of a part that is off; one
            that is absent and has no default.
    """
    hints, made = typing.get_type_hints(cls), {}
    for name, value in values.items():
        part = getattr(cls, "PARTS", {}).get(name)
        if part is not None and isinstance(value, Mapping):
            below, optional = f"{owner}.{name}", fits(None, hints[name])
            value = None if optional and _off(part, value, below) else build(part, value, below)  # noqa: PLW2901
        made[name] = tuple(value) if isinstance(value, list) else value
    check_types(cls, made, owner)
    for field in dataclasses.fields(cls):
        unset = field.default is field.default_factory is dataclasses.MISSING
        if unset and field.name not in made:
            raise ValueError(
                f"{owner}: {field.name} is absent; allowed: {_shown(hints[field.name])}"
            )
    return cls(**made)


def _off(part: type, values: Mapping[str, Any], owner: str) -> bool:
    """Whether an optional part's first field is None; its other fields must then be untouched."""
    first, *others = dataclasses.fields(part)
    unknown = values.keys() - {f.name for f in dataclasses.fields(part)}
    if values.get(first.name) is not None or unknown:
        return False
    for field in others:
        value = values.get(field.name, field.default)
        below = getattr(part, "PARTS", {}).get(field.name)
        if below is not None and isinstance(value, Mapping):
            value = None if _off(below, value, f"{owner}.{field.name}") else value
        if value != field.default:
            raise ValueError(f"{owner}: {field.name}={value!r}; allowed: set {first.name} as well")
    return True

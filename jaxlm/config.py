"""Validation shared by the config dataclasses: errors name the field, the value and what is allowed."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any


def check(owner: str, **fields: tuple[Any, bool, str]) -> None:
    """Raises ValueError for the first field whose test fails: field=(value, test, allowed)."""
    for name, (value, fine, allowed) in fields.items():
        if not fine:
            raise ValueError(f"{owner}: {name}={value!r}; allowed: {allowed}")


def one_of(value: Any, *allowed: Any) -> tuple[Any, bool, str]:
    """A field's test: one of a few values."""
    return value, value in allowed, ", ".join(str(a) for a in allowed)


def at_least(value: Any, low: float) -> tuple[Any, bool, str]:
    """A field's test: a number not below `low`."""
    return value, value >= low, f"a number >= {low}"


def build(cls: type, values: Mapping[str, Any], owner: str) -> Any:
    """A dataclass from a mapping; nested mappings become those in `cls.PARTS`.

    Raises:
        ValueError: an unknown field, with the nearest known name.
    """
    fields = {f.name: f for f in dataclasses.fields(cls)}
    made = {}
    for name, value in values.items():
        if name not in fields:
            near = difflib.get_close_matches(name, fields, 1)
            hint = f" (did you mean {near[0]}?)" if near else ""
            raise ValueError(f"{owner}.{name}: unknown field{hint}; allowed: {', '.join(fields)}")
        part = getattr(cls, "PARTS", {}).get(name)
        if part is not None and isinstance(value, Mapping):
            value = build(part, value, f"{owner}.{name}")
        made[name] = tuple(value) if isinstance(value, list) else value
    return cls(**made)

"""Names of position encodings, and the text form used in configs and on the command line.

nope
rope(base=500000, scaling=yarn(factor=4, original_length=2048))
lm_infinite(rope, window=256, num_sinks=4)
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
from typing import Any

from jaxlm.config import check_types
from jaxlm.positions.encoding import PositionEncoding

_REGISTRY: dict[str, Any] = {}


def register(cls: Any) -> Any:
    """Class decorator: makes an encoding (or a RoPE scaling) known under `cls.name`.

    Raises:
        ValueError: the name is empty or taken.
    """
    if not cls.name or cls.name in _REGISTRY:
        raise ValueError(f"name={cls.name!r}; allowed: a new, non-empty name")
    _REGISTRY[cls.name] = cls
    return cls


def available() -> tuple[str, ...]:
    """The names of all position encodings."""
    return tuple(sorted(n for n, c in _REGISTRY.items() if issubclass(c, PositionEncoding)))


def get(name: str, **options: Any) -> Any:
    """The encoding called `name` with these options.

    Raises:
        ValueError: unknown name or option, with the nearest known one.
    """
    if name not in _REGISTRY:
        near = difflib.get_close_matches(name, _REGISTRY, 1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise ValueError(
            f"position_encoding={name!r}{hint}; allowed: {', '.join(available())}, "
            "with options as in rope(base=500000)"
        )
    cls = _REGISTRY[name]
    check_types(cls, options, name)
    return cls(**options)


def parse(text: str | PositionEncoding) -> PositionEncoding:
    """Reads the text form; an encoding object is returned as it is.

    Only names, calls, numbers, strings and tuples are read: nothing in the text is ever run.

    Raises:
        ValueError: not of this form, or an unknown name or option.
    """
    if isinstance(text, PositionEncoding):
        return text
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except SyntaxError as error:
        raise ValueError(
            f"position_encoding={text!r}; allowed: a name or name(option=value)"
        ) from error
    encoding = _build(tree, text)
    if not isinstance(encoding, PositionEncoding):
        raise ValueError(f"position_encoding={text!r}; allowed: {', '.join(available())}")
    return encoding


def _build(node: ast.expr, text: str) -> Any:
    """One node of the text: a name, a call of a registered name, or a literal."""
    if isinstance(node, ast.Name):
        return get(node.id) if node.id in _REGISTRY or node.id.islower() else node.id
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        options = {k.arg: _value(k.value, text) for k in node.keywords if k.arg is not None}
        cls = _REGISTRY.get(node.func.id)
        if node.args and cls is not None:
            names = [f.name for f in dataclasses.fields(cls)]
            options |= {n: _value(a, text) for n, a in zip(names, node.args, strict=False)}
        return get(node.func.id, **options)
    raise ValueError(f"position_encoding={text!r}; allowed: a name or name(option=value)")


def _value(node: ast.expr, text: str) -> Any:
    """An option's value: a nested encoding or scaling, a word, or a literal."""
    if isinstance(node, ast.Name) and node.id not in available():
        return node.id  # a word such as slopes=harmonic; also kind=linear, though a scaling's name
    if isinstance(node, ast.Name | ast.Call):
        return _build(node, text)
    try:
        return ast.literal_eval(node)
    except ValueError as error:
        raise ValueError(
            f"position_encoding={text!r}; allowed as option values: numbers, words, tuples"
        ) from error

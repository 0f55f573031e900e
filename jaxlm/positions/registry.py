"""Names of position encodings, and the text form used in configs and on the command line.

nope
rope(base=500000, scaling=yarn(factor=4, original_length=2048))
lm_infinite(rope, window=256, num_sinks=4)
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import typing
from collections.abc import Mapping
from typing import Any

from jaxlm.config import check_types, fits
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


def kind(name: str) -> Any:
    """The class registered under a name."""
    return _REGISTRY[name]


def get(name: str, **options: Any) -> Any:
    """The encoding (or RoPE scaling) called `name` with these options.

    An option that is an encoding or a scaling itself may be given as its text.

    Raises:
        ValueError: unknown name or option, with the nearest known one; an option that is missing.
    """
    if name not in _REGISTRY:
        raise _unknown("position_encoding", name, available())
    cls = _REGISTRY[name]
    hints = typing.get_type_hints(cls)
    given = {n: _nested(f"{name}: {n}", v, hints.get(n)) for n, v in options.items()}
    check_types(cls, given, name)
    required = [f.name for f in dataclasses.fields(cls) if f.default is dataclasses.MISSING]
    missing = [n for n in required if n not in given]
    if missing:
        example = ", ".join(f"{n}=…" for n in required)
        raise ValueError(f"{name}: {', '.join(missing)} missing; allowed: {name}({example})")
    return cls(**given)


def parse(text: str | PositionEncoding, **options: Any) -> PositionEncoding:
    """Reads the text form; an encoding object is returned as it is.

    Only names, calls, numbers, strings and tuples are read: nothing in the text is ever run.

    Args:
        text: such as "rope(base=500000)", or an encoding.
        options: more of the encoding's fields, beside those that the text gives.

    Raises:
        ValueError: not of this form, an unknown name or option, or an option given twice.
    """
    if isinstance(text, PositionEncoding):
        return _read("position_encoding", str(text), available(), options) if options else text
    return _read("position_encoding", text, available(), options)


def _unknown(field: str, name: str, names: tuple[str, ...]) -> ValueError:
    """The error for a name that is none of `names`; tells the nearest."""
    near = difflib.get_close_matches(name.lower(), names, 1)
    hint = f" (did you mean {near[0]}?)" if near else ""
    return ValueError(f"{field}={name!r}{hint}; allowed: {', '.join(names)}")


def _nested(field: str, value: Any, hint: Any) -> Any:
    """An option's value; where the field is an encoding or a scaling, its text is read."""
    kinds = tuple(k for k in typing.get_args(hint) or (hint,) if isinstance(k, type))
    names = tuple(sorted(n for n, c in _REGISTRY.items() if issubclass(c, kinds)))
    if not names:
        return value
    if isinstance(value, str):
        return _read(field, value, names, {})
    if not fits(value, hint):
        raise ValueError(f"{field}={value!r}; allowed: {', '.join(names)}")
    return value


def _read(field: str, text: str, names: tuple[str, ...], more: Mapping[str, Any]) -> Any:
    """What `text` describes, one of `names`, with `more` options."""
    form = f"{field}={text!r}; allowed: a name or name(option=value)"
    try:
        node = ast.parse(text.strip(), mode="eval").body
    except SyntaxError as error:
        raise ValueError(form) from error
    head = node.func if isinstance(node, ast.Call) else node
    if not isinstance(head, ast.Name):
        raise ValueError(form)
    if head.id not in names:
        raise _unknown(field, head.id, names)
    given = _options(node, head.id) if isinstance(node, ast.Call) else []
    options: dict[str, Any] = {}
    for name, value in (*given, *more.items()):
        if name in options:
            raise ValueError(f"{head.id}: {name}={value!r} given again; allowed: each option once")
        options[name] = value
    return get(head.id, **options)


def _options(call: ast.Call, owner: str) -> list[tuple[str, Any]]:
    """(field, value) of a call's arguments in their order; those without a name come first."""
    fields = [f.name for f in dataclasses.fields(_REGISTRY[owner])]
    if len(call.args) > len(fields):
        raise ValueError(
            f"{owner}: {len(call.args)} values without a name; allowed: "
            f"{len(fields)} ({', '.join(fields) or 'none'})"
        )
    pairs = [*zip(fields, call.args, strict=False), *((k.arg, k.value) for k in call.keywords)]
    found = []
    for name, node in pairs:
        if name is None or isinstance(node, ast.Starred):
            raise ValueError(f"{owner}: {ast.unparse(call)}; allowed: options without * and **")
        found.append((name, _value(f"{owner}: {name}", node)))
    return found


def _value(field: str, node: ast.expr) -> Any:
    """An option's value: a literal, a word, or the text of a nested encoding or scaling."""
    if isinstance(node, ast.Name | ast.Call):
        return ast.unparse(node)
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"{field}={ast.unparse(node)}; allowed: numbers, words, tuples, name(option=value)"
        ) from error

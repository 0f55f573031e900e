"""Things that have a name and options, and the text form in which configs and flags say them.

nope
rope(base=500000, scaling=yarn(factor=4, original_length=2048))
ring(window=4096, num_sinks=4)
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import typing
from collections.abc import Mapping
from typing import Any

from jaxlm.config import check_types, fits


def text_of(one: Any) -> str:
    """What `Registry.parse` turns back into an equal one: its name and what is not the default."""
    given = [
        f"{f.name}={_shown(getattr(one, f.name))}"
        for f in dataclasses.fields(one)
        if getattr(one, f.name) != f.default
    ]
    return f"{one.name}({', '.join(given)})" if given else one.name


def _shown(value: Any) -> str:
    """A string that is no word, such as a path, stands in quotes."""
    plain = not isinstance(value, str) or value.isidentifier()
    return str(value) if plain else repr(value)


class Registry:
    """Frozen dataclasses by their `name`: those that may be asked for, and what they are made of.

    Args:
        field: what is asked for, as errors call it.
        base: of the classes that may be; others are options of theirs.
    """

    def __init__(self, field: str, base: type):
        self._field, self._base = field, base
        self._classes: dict[str, Any] = {}

    def register(self, cls: Any) -> Any:
        """Class decorator: makes a class known under `cls.name`.

        Raises:
            ValueError: the name is empty or taken.
        """
        if not cls.name or cls.name in self._classes:
            raise ValueError(f"name={cls.name!r}; allowed: a new, non-empty name")
        self._classes[cls.name] = cls
        return cls

    def available(self) -> tuple[str, ...]:
        """The names of all that may be asked for."""
        return self._names(self._base)

    def kind(self, name: str) -> Any:
        """The class registered under a name."""
        return self._classes[name]

    def get(self, name: str, **options: Any) -> Any:
        """The one called `name` with these options; an option that is one itself may be its text.

        Raises:
            ValueError: unknown name or option, with the nearest known one; a missing option.
        """
        if name not in self._classes:
            raise self._unknown(self._field, name, self.available())
        cls = self._classes[name]
        hints = typing.get_type_hints(cls)
        given = {n: self._nested(f"{name}: {n}", v, hints.get(n)) for n, v in options.items()}
        check_types(cls, given, name)
        required = [f.name for f in dataclasses.fields(cls) if f.default is dataclasses.MISSING]
        missing = [n for n in required if n not in given]
        if missing:
            example = ", ".join(f"{n}=…" for n in required)
            raise ValueError(f"{name}: {', '.join(missing)} missing; allowed: {name}({example})")
        return cls(**given)

    def parse(self, text: Any, **options: Any) -> Any:
        """Reads the text form; an object of these is returned as it is.

        Only names, calls, numbers, strings and tuples are read: nothing in the text is ever run.

        Args:
            text: such as "rope(base=500000)", or what it stands for.
            options: more fields, beside those that the text gives.

        Raises:
            ValueError: not of this form, an unknown name or option, or an option given twice.
        """
        if isinstance(text, self._base) and not options:
            return text
        return self._read(self._field, str(text), self.available(), options)

    def _names(self, kinds: Any) -> tuple[str, ...]:
        return tuple(sorted(n for n, c in self._classes.items() if issubclass(c, kinds)))

    def _unknown(self, field: str, name: str, names: tuple[str, ...]) -> ValueError:
        """The error for a name that is none of `names`; tells the nearest."""
        near = difflib.get_close_matches(name.lower(), names, 1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        return ValueError(f"{field}={name!r}{hint}; allowed: {', '.join(names)}")

    def _nested(self, field: str, value: Any, hint: Any) -> Any:
        """An option's value; where the field is one of these itself, its text is read."""
        kinds = tuple(k for k in typing.get_args(hint) or (hint,) if isinstance(k, type))
        names = self._names(kinds)
        if not names:
            return value
        if isinstance(value, str):
            return self._read(field, value, names, {})
        if not fits(value, hint):
            raise ValueError(f"{field}={value!r}; allowed: {', '.join(names)}")
        return value

    def _read(self, field: str, text: str, names: tuple[str, ...], more: Mapping[str, Any]) -> Any:
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
            raise self._unknown(field, head.id, names)
        given = self._options(node, head.id) if isinstance(node, ast.Call) else []
        options: dict[str, Any] = {}
        for name, value in (*given, *more.items()):
            if name in options:
                raise ValueError(
                    f"{head.id}: {name}={value!r} given again; allowed: each option once"
                )
            options[name] = value
        return self.get(head.id, **options)

    def _options(self, call: ast.Call, owner: str) -> list[tuple[str, Any]]:
        """(field, value) of a call's arguments in their order; those without a name come first."""
        fields = [f.name for f in dataclasses.fields(self._classes[owner])]
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
    """An option's value: a literal, a word, or the text of one that is nested."""
    if isinstance(node, ast.Name | ast.Call):
        return ast.unparse(node)
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"{field}={ast.unparse(node)}; allowed: numbers, words, tuples, name(option=value)"
        ) from error

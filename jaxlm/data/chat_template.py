"""What a chat template may use: Jinja in its sandbox, and what transformers adds to it."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping
from typing import Any

from jaxlm.data.optional import optional


def render(template: str, variables: Mapping[str, Any]) -> str:
    """The template's text.

    As in transformers it may `break` and `continue`, mark a `generation`, tell the time by
    `strftime_now(format)`, refuse by `raise_exception(message)`, and `tojson` writes characters as
    they are.

    Raises:
        ValueError: it refuses, or fails in whatever way.
    """
    sandbox = optional("jinja2.sandbox", "a chat template")
    environment = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _generation()]
    )
    environment.filters["tojson"] = _tojson
    environment.globals |= {"raise_exception": _refuse, "strftime_now": _strftime_now}
    try:
        return environment.from_string(template).render(variables)
    except _Refusal as refusal:
        raise ValueError(f"says: {refusal}") from refusal
    except Exception as error:  # a template is a program: anything may go wrong in it
        raise ValueError(f"fails: {error}") from error


class _Refusal(Exception):  # noqa: N818  it is no fault of the template's
    pass


def _refuse(message: str) -> None:
    raise _Refusal(message)


def _strftime_now(form: str) -> str:
    return datetime.datetime.now().strftime(form)


def _tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    """Jinja's own would escape what HTML must not hold."""
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def _generation() -> type:
    """{% generation %}…{% endgeneration %} is what it holds: what is learned is found otherwise."""
    extensions = optional("jinja2.ext", "a chat template")

    class Generation(extensions.Extension):
        tags = frozenset({"generation"})

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    return Generation

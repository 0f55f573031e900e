"""Position encodings, one file each; `available()` lists them, `parse` reads their text form.

To add one: a file with a frozen dataclass under `@register`, and its import below. The shared tests
pick it up by themselves.
"""

from jaxlm.positions import (  # noqa: F401  each import registers its encoding
    alibi,
    by_kind,
    fire,
    kerple,
    learned,
    lm_infinite,
    nope,
    rope,
    rope_alibi,
    sandwich,
    sinusoidal,
    t5,
    xpos,
)
from jaxlm.positions.encoding import Dimensions, Parameter, PositionEncoding, Rotation
from jaxlm.positions.registry import available, get, parse, register

__all__ = [
    "Dimensions",
    "Parameter",
    "PositionEncoding",
    "Rotation",
    "available",
    "get",
    "parse",
    "register",
]

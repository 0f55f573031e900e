"""One kernel and its oracle, called alike."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

# (kernel's results, the oracle's): pytrees of equal structure.
Results = tuple[Any, Any]


@dataclasses.dataclass(frozen=True)
class Agreement:
    """One kernel against its oracle.

    Attributes:
        kernel: its name.
        about: what of it is called.
        run: a dtype's name → results.
    """

    kernel: str
    about: str
    run: Callable[[str], Results]


def normal(*shape: int, dtype: str = "float32") -> jax.Array:
    """The same numbers for the same shape."""
    return jax.random.normal(jax.random.key(sum(shape)), shape, dtype)


def with_gradients(
    kernel: Callable[..., Any], oracle: Callable[..., Any], *x: jax.Array
) -> Results:
    """Outputs of both and the gradients of all arguments under the same cotangents. In programs of
    their own: one by one, the operations around the kernels take longest to compile.
    """
    found, back = jax.jit(lambda *x: jax.vjp(kernel, *x))(*x)
    wanted, back_wanted = jax.jit(lambda *x: jax.vjp(oracle, *x))(*x)
    given = jax.tree.map(lambda a: normal(*a.shape, dtype=a.dtype.name), found)
    cotangents = jax.tree.map(lambda a, b: a.astype(b.dtype), given, wanted)
    # Not `back` itself: where it has two kernels, they would run at a time and may wait for ever.
    return (found, back(given)), (wanted, jax.jit(lambda b, d: b(d))(back_wanted, cotangents))

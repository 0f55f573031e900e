"""Arrays of a cache for the layers as the model has them: see `jaxlm.model.layouts.stack_sizes`.

Those that a loop goes over are one array, and each of the others has its own, which need not be cut
out of a larger one.
"""

from __future__ import annotations

import itertools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from jaxlm.model.config import ModelConfig
from jaxlm.model.layouts import stack_sizes


def empty_stacks(
    config: ModelConfig, shape: tuple[int, ...], dtype: Any = None
) -> tuple[Array, ...]:
    """Zeros [layers, *shape] of each stack, in the config's dtype if no other is given.

    Distinct buffers: a donated argument must not hold one buffer twice.
    """
    return tuple(jnp.zeros((n, *shape), dtype or config.dtype) for n in stack_sizes(config))


def check_sees_no_future(config: ModelConfig, capacity: int) -> None:
    """Raises ValueError for a model whose tokens see later ones, and a capacity below 1."""
    if config.sees_ahead:
        raise ValueError(
            f"layer_pattern={config.attention.layer_pattern}; allowed: no bidirectional layer "
            "in a model that generates or keeps a cache"
        )
    if capacity < 1:
        raise ValueError(f"capacity={capacity}; allowed: an integer >= 1")


def of_stack(
    keys: tuple[Array, ...], values: tuple[Array, ...], index: int | Int[Array, ""]
) -> tuple[Array, Array, Int[Array, ""]]:
    """The stack that a layer is in, and which of it: a known layer of any, or one in a loop over
    the first.
    """
    stack, layer = place_of(keys, index)
    return keys[stack], values[stack], layer


def place_of(stacks: tuple[Array, ...], index: int | Int[Array, ""]) -> tuple[int, Int[Array, ""]]:
    """Which of the stacks a layer is in, and where."""
    stack = 0
    if isinstance(index, int):
        while index >= (size := stacks[stack].shape[0]):
            stack, index = stack + 1, index - size
    return stack, jnp.asarray(index)


def split_stacks(buffers: tuple[Array, ...], new: Array) -> list[Array]:
    """What of all layers [layers, …] goes into each stack."""
    ends = itertools.accumulate(len(b) for b in buffers[:-1])
    return jnp.split(new, list(ends))


def reorder_rows(cache: Any, rows: Int[Array, "R"]) -> Any:
    """Row i becomes what row `rows[i]` was, of any number of rows: axis 1 of arrays by layer, 0 of
    the others.
    """
    return jax.tree.map(lambda a: a[rows] if a.ndim < 3 else a[:, rows], cache)

"""How the matrix lies in HBM: what is asked of it must not make XLA copy all of it."""

from __future__ import annotations

import jax
import jax.numpy as jnp

LANES, SUBLANES = 128, 8


def lies_transposed(rows: int, columns: int) -> bool:
    """Whether a TPU keeps an array of this shape column by column.

    The axis that runs along the lanes is padded to 128, the other to 8: XLA takes the order that
    pads less. A head of 50257 entries lies as its transpose does, and a kernel's operand, which
    lies as it is written, would be a copy of it.
    """
    return _padded(columns, rows) < _padded(rows, columns)


def _padded(sublanes: int, lanes: int) -> int:
    return -(-sublanes // SUBLANES) * SUBLANES * -(-lanes // LANES) * LANES


def entries(matrix: jax.Array, ids: jax.Array, vocab_axis: int) -> jax.Array:
    """Row ids[m] of a matrix [V, D], or column of [D, V]: [M, D].

    Columns are taken from 128 rows at a time: at once, XLA would first turn the whole matrix.
    """
    if vocab_axis == 0:
        return jnp.take(matrix, ids, axis=0, mode="clip")
    width, vocab = matrix.shape
    step = min(LANES, width)

    def take(n: jax.Array, found: jax.Array) -> jax.Array:
        first = n * step  # where that leaves too few, both slices begin earlier
        rows = jax.lax.dynamic_slice(matrix, (first, 0), (step, vocab))
        part = jnp.take(rows, ids, axis=1, mode="clip").T
        return jax.lax.dynamic_update_slice(found, part, (0, first))

    empty = jnp.zeros((ids.shape[0], width), matrix.dtype)
    return jax.lax.fori_loop(0, -(-width // step), take, empty)

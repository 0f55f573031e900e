"""Writing new tokens where each row of a batch has got to."""

from __future__ import annotations

import jax
from jaxtyping import Array, Int


def write_rows(
    buffer: Array, new: Array, starts: Int[Array, "B"], batch: int = 0, time: int = 1
) -> Array:
    """`new` in the place of as many entries of `buffer` from each row's `starts` on.

    A loop over the rows: XLA makes a copy of the whole buffer for the scatter that one update of
    all rows would be, and here writes in place.

    Args:
        buffer, new: alike but along the axis `time`.
        starts: where `new` begins along it.
        batch: the axis of rows.
    """

    def write(row: Array, buffer: Array) -> Array:
        at = [0] * buffer.ndim
        at[batch], at[time] = row, starts[row]
        part = jax.lax.dynamic_slice_in_dim(new, row, 1, batch).astype(buffer.dtype)
        return jax.lax.dynamic_update_slice(buffer, part, at)

    return jax.lax.fori_loop(0, starts.shape[0], write, buffer)

"""Writing new tokens where each row of a batch has got to."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

# More tokens than these are not written one after the other: the whole buffer is made anew.
MOST_WRITES = 32


def padding_last(
    kv: tuple[Array, ...], positions: Int[Array, "B T"], segment_ids: Int[Array, "B T"]
) -> tuple[tuple[Array, ...], Int[Array, "B T"], Int[Array, "B T"]]:
    """The same tokens [layers, batch, length, …], those of segment 0 behind the others of a row."""
    if positions.shape[1] == 1:
        return kv, positions, segment_ids
    order = jnp.argsort(segment_ids == 0, axis=1, stable=True)
    shape = (1, *order.shape, *(1,) * (kv[0].ndim - 3))
    kv = tuple(jnp.take_along_axis(x, order.reshape(shape), 2) for x in kv)
    positions = jnp.take_along_axis(positions, order, 1)
    return kv, positions, jnp.take_along_axis(segment_ids, order, 1)


def write_rows(
    buffer: Array, new: Array, starts: Int[Array, "B"], batch: int = 0, time: int = 1
) -> Array:
    """`new` in the place of as many entries of `buffer` from each row's `starts` on.

    A loop over the rows: XLA makes a copy of the whole buffer for the scatter that one update of
    all rows would be, and here writes in place. Where a row gets one integer the buffer, which is
    small then, is made anew.

    Args:
        buffer, new: alike but along the axis `time`.
        starts: where `new` begins along it.
        batch: the axis of rows.
    """

    if new.shape == (len(starts), 1):
        return jnp.where(jnp.arange(buffer.shape[1])[None] == starts[:, None], new, buffer)

    def write(row: Array, buffer: Array) -> Array:
        at: list[Any] = [0] * buffer.ndim
        at[batch], at[time] = row, starts[row]
        part = jax.lax.dynamic_slice_in_dim(new, row, 1, batch).astype(buffer.dtype)
        return jax.lax.dynamic_update_slice(buffer, _as_it_is(part), at)

    return jax.lax.fori_loop(0, starts.shape[0], write, buffer)


def write_slots(
    buffer: Array,
    new: Array,
    slots: Int[Array, "B T"],
    there: Bool[Array, "B T"],
    batch: int = 0,
    time: int = 1,
) -> Array:
    """Each of T new tokens in a slot of its row; of several in one slot the last stays.

    Args:
        buffer, new: alike but along the axis `time`.
        slots: of each token, along that axis.
        there: False leaves a token out.
        batch: the axis of rows.
    """
    if slots.shape[1] > MOST_WRITES:
        return _made_anew(buffer, new, slots, there, batch, time)
    B = slots.shape[0]

    def write(i: Array, buffer: Array) -> Array:
        row, token = i % B, i // B
        at: list[Any] = [0] * buffer.ndim
        at[batch], at[time] = row, slots[row, token]
        size = [1 if axis in (batch, time) else n for axis, n in enumerate(buffer.shape)]
        old = jax.lax.dynamic_slice(buffer, at, size)
        at_new: list[Any] = [0] * buffer.ndim
        at_new[batch], at_new[time] = row, token
        part = jax.lax.dynamic_slice(new, at_new, size).astype(buffer.dtype)
        part = _as_it_is(jnp.where(there[row, token], part, old))
        return jax.lax.dynamic_update_slice(buffer, part, at)

    return jax.lax.fori_loop(0, slots.size, write, buffer)


def _as_it_is(part: Array) -> Array:
    """Hides where a loop's part comes from: libtpu 0.0.42 takes a loop that puts all rows of an
    array into a longer one for that array itself, sees that the shapes differ, and gives up.
    """
    return jax.lax.optimization_barrier(part)


def _made_anew(
    buffer: Array,
    new: Array,
    slots: Int[Array, "B T"],
    there: Bool[Array, "B T"],
    batch: int,
    time: int,
) -> Array:
    """By a gather: which token each slot takes, if any."""
    (B, T), S = slots.shape, buffer.shape[time]
    order = jnp.where(there, jnp.arange(1, T + 1)[None], 0)
    newest = jnp.zeros((B, S), jnp.int32).at[jnp.arange(B)[:, None], slots].max(order)
    shape = [n if axis in (batch, time) else 1 for axis, n in enumerate(buffer.shape)]
    turned = newest if batch < time else newest.T
    token = jnp.maximum(turned - 1, 0).reshape(shape)
    taken = jnp.take_along_axis(new, token, axis=time).astype(buffer.dtype)
    return jnp.where((turned > 0).reshape(shape), taken, buffer)


def round_up(n: int, multiple: int) -> int:
    """The least multiple that is not below n."""
    return -(-n // multiple) * multiple

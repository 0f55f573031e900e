"""Rows of which each device has a part, under a mask that does not reach far: a device asks the
devices before it for the last keys of theirs, and all of them for the first tokens of documents.

    device         0        1        2        3
    keys       s·······  ········  ········  ········
    device 3   s                   ──window──────────   sinks, the part before, its own

So cost and traffic follow the window, whatever the number of devices.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxlm.attention.inputs import AttentionInputs, AttentionSpec
from jaxlm.attention.local import attend_local
from jaxlm.attention.mask import AttentionMask
from jaxlm.sharding.mesh import CONTEXT

# Of `AttentionInputs`: what moves, [batch, length, …].
KEYS = ("k", "v", "k_far", "k_positions", "k_segment_ids")


class Reach(NamedTuple):
    """Of a mask: the last `window` keys, and those at positions below `num_sinks`."""

    window: int
    num_sinks: int


def reach_of(mask: AttentionMask) -> Reach | None:
    """How far back queries see; None: all the way, or forward."""
    window = num_sinks = 0
    for interval in mask.intervals:
        sizes = [size for size in (interval.window, interval.chunk) if size is not None]
        if interval.ahead != 0:
            return None
        if sizes:
            window = max(window, min(sizes))
        elif interval.below is not None:
            num_sinks = max(num_sinks, interval.below)
        else:
            return None
    return Reach(max(window, 1), num_sinks)


def parts_before(reach: Reach, part: int) -> int:
    """Of how many devices before it a device with `part` tokens sees keys within the window."""
    return -(-(reach.window - 1) // part)


def attend_halo(spec: AttentionSpec, x: AttentionInputs, reach: Reach) -> tuple[Any, Any]:
    """Softmax attention to what the mask shows of all parts; on each device of the context axis, as
    `jax.shard_map` runs it.

    Args:
        spec: the static description, of tokens in order (`aligned`).
        x: this device's part of rows cut in order.
        reach: of its mask.

    Returns:
        As `jaxlm.attention.attend.attend`, of this part.
    """
    own = {name: a for name in KEYS if (a := getattr(x, name)) is not None}
    count = parts_before(reach, x.q.shape[1])
    pieces = [_from_before(own, turns) for turns in range(count, 0, -1)]
    if reach.num_sinks:
        pieces.insert(0, _sinks(own, reach.num_sinks, count))
    keys = jax.tree.map(lambda *a: jnp.concatenate(a, axis=1), *pieces, own)
    return attend_local(dataclasses.replace(spec, aligned=False), dataclasses.replace(x, **keys))


def _from_before(keys: dict[str, Any], turns: int) -> dict[str, Any]:
    """Those of the device `turns` before; where there is none, zeros, whose segment is padding."""
    moves = [(d, d + turns) for d in range(jax.lax.axis_size(CONTEXT) - turns)]
    return {name: jax.lax.ppermute(a, CONTEXT, moves) for name, a in keys.items()}


def _sinks(keys: dict[str, Any], num_sinks: int, count: int) -> dict[str, Any]:
    """First tokens of the documents that go on at the end of each part, [batch, P·num_sinks, …];
    padding for those whose part is among the `count` before this one, or later.

    A document that began before those goes on at the end of each part that has first tokens of it:
    so they are the last ones of that part.
    """
    slots = jnp.arange(keys["k"].shape[1], dtype=jnp.int32)
    first = keys["k_positions"][:, None] == jnp.arange(num_sinks)[None, :, None]
    first &= keys["k_segment_ids"][:, None] != 0
    slot = jnp.where(first, slots, -1).max(-1)  # [batch, num_sinks], -1: not here

    def taken(a: Any) -> Any:
        index = jnp.maximum(slot, 0).reshape(*slot.shape, *[1] * (a.ndim - 2))
        return jnp.take_along_axis(a, index, axis=1)

    here = {name: taken(a) for name, a in keys.items()}
    here["k_segment_ids"] = jnp.where(slot >= 0, here["k_segment_ids"], 0)
    parts = {name: jax.lax.all_gather(a, CONTEXT, axis=1) for name, a in here.items()}
    device = jnp.arange(jax.lax.axis_size(CONTEXT))[None, :, None]
    far = device < jax.lax.axis_index(CONTEXT) - count
    parts["k_segment_ids"] = jnp.where(far, parts["k_segment_ids"], 0)
    return {name: a.reshape(a.shape[0], -1, *a.shape[3:]) for name, a in parts.items()}

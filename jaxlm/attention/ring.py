"""Rows of which each device has a part: keys and values go round, from device to device.

Ring attention (Liu et al. 2023, arXiv 2310.01889) with a row's tokens dealt out so that all devices
have as many visible pairs under a causal mask: of 2·P chunks, device d of P takes d and 2·P-1-d.

    chunk      0   1   2   3   4   5   6   7
    device     0   1   2   3   3   2   1   0

Each turn a device attends with its queries to the keys it holds and passes them on, so no device
holds more than two parts of keys and values at a time. The backward pass goes round once more, with
the keys' gradients, and works every partial attention out anew.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxlm.attention.inputs import AttentionInputs, AttentionSpec
from jaxlm.attention.local import attend_local
from jaxlm.attention.reference import HIDDEN
from jaxlm.sharding.mesh import CONTEXT


class Queries(NamedTuple):
    """This device's, and what is a head's."""

    q: Float[Array, "B T N H"]
    q_far: Float[Array, "B T N H"] | None
    head_parameters: Any


class Keys(NamedTuple):
    """Those that are here this turn."""

    k: Float[Array, "B T K H"]
    v: Float[Array, "B T K H"]
    k_far: Float[Array, "B T K H"] | None


class Places(NamedTuple):
    """Of tokens."""

    positions: Int[Array, "B T"]
    segment_ids: Int[Array, "B T"]


def attend_ring(
    spec: AttentionSpec, x: AttentionInputs
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
    """Softmax attention to all parts of the rows; on each device of the context axis, as
    `jax.shard_map` runs it.

    Args:
        spec: the static description; that slots tell distances is not made use of.
        x: this device's part, an even number of tokens, of rows cut in order; without sink logits.

    Returns:
        As `jaxlm.attention.attend.attend`, of this part.
    """
    q, q_far, keys, q_at, k_at = jax.tree.map(
        _deal,
        (
            x.q,
            x.q_far,
            Keys(x.k, x.v, x.k_far),
            Places(x.q_positions, x.q_segment_ids),
            Places(x.k_positions, x.k_segment_ids),
        ),
    )
    spec = dataclasses.replace(spec, aligned=False)
    found = _ring(spec, Queries(q, q_far, x.head_parameters), keys, q_at, k_at)
    return jax.tree.map(_undeal, found)


def _moves(odd: int) -> list[tuple[int, int]]:
    """Whose even (odd) chunk of the row in order goes to whom."""
    P = jax.lax.axis_size(CONTEXT)
    chunks = ((d, 2 * d + odd) for d in range(P))
    return [(d, chunk if chunk < P else 2 * P - 1 - chunk) for d, chunk in chunks]


def _deal(x: Array) -> Array:
    """[B, T, …] of the chunks 2·d and 2·d + 1 of device d → of its chunks d and 2·P-1-d."""
    halves = jnp.split(x, 2, axis=1)
    even, odd = (jax.lax.ppermute(x, CONTEXT, _moves(i)) for i, x in enumerate(halves))
    swap = jax.lax.axis_index(CONTEXT) % 2 == 1  # chunk d is an odd one
    return jnp.concatenate([jnp.where(swap, odd, even), jnp.where(swap, even, odd)], axis=1)


def _undeal(x: Array) -> Array:
    """The inverse of `_deal`."""
    low, high = jnp.split(x, 2, axis=1)
    swap = jax.lax.axis_index(CONTEXT) % 2 == 1
    halves = jnp.where(swap, high, low), jnp.where(swap, low, high)
    back = ([(b, a) for a, b in _moves(i)] for i in range(2))
    return jnp.concatenate(
        [jax.lax.ppermute(x, CONTEXT, moves) for x, moves in zip(halves, back, strict=True)], axis=1
    )


def _pass_on(tree: Any) -> Any:
    """To the next device, from the one before."""
    P = jax.lax.axis_size(CONTEXT)
    moves = [(d, (d + 1) % P) for d in range(P)]
    return jax.tree.map(lambda x: jax.lax.ppermute(x, CONTEXT, moves), tree)


def _partial(
    spec: AttentionSpec, q_at: Places, k_at: Places, queries: Queries, keys: Keys
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
    """To the keys that are here; in float32."""
    out, lse = attend_local(
        spec,
        AttentionInputs(
            q=queries.q,
            k=keys.k,
            v=keys.v,
            q_positions=q_at.positions,
            k_positions=k_at.positions,
            q_segment_ids=q_at.segment_ids,
            k_segment_ids=k_at.segment_ids,
            head_parameters=queries.head_parameters,
            q_far=queries.q_far,
            k_far=keys.k_far,
        ),
    )
    return out.astype(jnp.float32), lse


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _ring(spec: AttentionSpec, queries: Queries, keys: Keys, q_at: Places, k_at: Places) -> Any:
    return _forward(spec, queries, keys, q_at, k_at)[0]


def _forward(spec: AttentionSpec, queries: Queries, keys: Keys, q_at: Places, k_at: Places) -> Any:
    def turn(_: Any, state: Any) -> Any:
        (out, lse), (keys, k_at) = state
        following = _pass_on((keys, k_at))
        more, its_lse = _partial(spec, q_at, k_at, queries, keys)
        both = jnp.logaddexp(lse, its_lse)
        out = out * jnp.exp(lse - both)[..., None] + more * jnp.exp(its_lse - both)[..., None]
        return (out, both), following

    nothing = jnp.zeros(queries.q.shape, jnp.float32)
    state = (nothing, jnp.full(queries.q.shape[:3], HIDDEN, jnp.float32)), (keys, k_at)
    (out, lse), _ = jax.lax.fori_loop(0, jax.lax.axis_size(CONTEXT), turn, state)
    out = out.astype(queries.q.dtype)
    return (out, lse), (queries, keys, q_at, k_at, out, lse)


def _backward(spec: AttentionSpec, saved: Any, cotangents: Any) -> Any:
    """out = Σ share·part, where share = exp(lse of the part - lse of all)."""
    queries, keys, q_at, k_at, out, lse = saved
    d_out, d_lse = (x.astype(jnp.float32) for x in cotangents)

    def turn(_: Any, state: Any) -> Any:
        d_queries, d_keys, (keys, k_at) = state
        following = _pass_on((keys, k_at))
        part = functools.partial(_partial, spec, q_at, k_at)
        (more, its_lse), back = jax.vjp(part, queries, keys)
        share = jnp.exp(its_lse - lse)
        d_its_lse = share * ((d_out * (more - out)).sum(-1) + d_lse)
        d_here = back((share[..., None] * d_out, d_its_lse))
        d_queries, d_keys = jax.tree.map(
            lambda sum_, x: sum_ + x.astype(jnp.float32), (d_queries, d_keys), d_here
        )
        return d_queries, _pass_on(d_keys), following

    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), (queries, keys))
    # After as many turns as there are devices, keys and their gradients are at home.
    state = (*zeros, (keys, k_at))
    d_queries, d_keys, _ = jax.lax.fori_loop(0, jax.lax.axis_size(CONTEXT), turn, state)
    grads = jax.tree.map(lambda d, x: d.astype(x.dtype), (d_queries, d_keys), (queries, keys))
    return *grads, None, None


_ring.defvjp(_forward, _backward)

"""Attention with materialised scores: the form to read, and the oracle of every other one."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxlm.attention.inputs import AttentionInputs, AttentionSpec

HIDDEN = -0.7 * float(jnp.finfo(jnp.float32).max)


def visible(spec: AttentionSpec, x: AttentionInputs) -> Bool[Array, "B T S"]:
    """Which keys each query sees: the mask over positions, within one segment, never padding."""
    seen = spec.mask.to_dense(x.q_positions, x.k_positions)
    same = x.q_segment_ids[:, :, None] == x.k_segment_ids[:, None, :]
    seen = seen & same & (x.k_segment_ids != 0)[:, None, :]
    return seen if x.tree is None else seen & x.tree


def scores(spec: AttentionSpec, x: AttentionInputs) -> Float[Array, "B N T S"]:
    """Attention logits in float32 before the mask: scaled, soft-capped, position bias applied."""
    B, T, N, H = x.q.shape
    K = x.k.shape[2]

    def dots(q: Array, k: Array) -> Array:
        q = q.reshape(B, T, K, N // K, H)
        s = jnp.einsum("btkgh,bskh->bkgts", q, k, preferred_element_type=jnp.float32)
        return s.reshape(B, N, T, -1) * spec.scale

    s = dots(x.q, x.k)
    if spec.ceiling is not None and x.q_far is not None and x.k_far is not None:
        distance = x.q_positions[:, :, None] - x.k_positions[:, None, :]
        s = jnp.where((distance >= spec.ceiling)[:, None], dots(x.q_far, x.k_far), s)
    if spec.softcap is not None:
        s = spec.softcap * jnp.tanh(s / spec.softcap)
    return with_position(spec, x.head_parameters, s, x.q_positions, x.k_positions)


def with_position(
    spec: AttentionSpec,
    head_parameters: Any,
    s: Float[Array, "B N T S"],
    q_positions: Int[Array, "B T"],
    k_positions: Int[Array, "B S"],
) -> Float[Array, "B N T S"]:
    """Scores after the position encoding's change, at distances that end at the ceiling."""
    if spec.score is None:
        return s
    distance = q_positions[:, :, None] - k_positions[:, None, :]
    if spec.ceiling is not None:
        distance = jnp.minimum(distance, spec.ceiling)
    one_row = jax.vmap(spec.score, in_axes=(0, 0, None, None))  # over heads
    return jax.vmap(one_row, in_axes=(None, 0, 0, 0))(  # over the batch
        head_parameters, s, distance, q_positions[:, :, None]
    )


def attend_reference(
    spec: AttentionSpec, x: AttentionInputs
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
    """Softmax attention in O(T·S) memory.

    Returns:
        The output [batch, length, heads, head_dim] in q's dtype (zeros where a query sees nothing)
        and the float32 log-sum-exp of the visible scores [batch, length, heads].
    """
    B, T, N, H = x.q.shape
    K = x.k.shape[2]
    seen = visible(spec, x)[:, None]
    s = jnp.where(seen, scores(spec, x), HIDDEN)
    top = s.max(-1, keepdims=True)
    if x.sink_logits is not None:
        top = jnp.maximum(top, x.sink_logits[None, :, None, None])
    top = jax.lax.stop_gradient(top)
    p = jnp.where(seen, jnp.exp(s - top), 0.0)
    total = p.sum(-1, keepdims=True)
    if x.sink_logits is not None:
        total += jnp.exp(x.sink_logits[None, :, None, None] - top)
    p = (p / jnp.where(total == 0, 1.0, total)).astype(x.v.dtype).reshape(B, K, N // K, T, -1)
    out = jnp.einsum("bkgts,bskh->btkgh", p, x.v).reshape(B, T, N, H)
    lse = jnp.where(total == 0, HIDDEN, top + jnp.log(jnp.where(total == 0, 1.0, total)))
    return out.astype(x.q.dtype), lse[..., 0].swapaxes(1, 2)

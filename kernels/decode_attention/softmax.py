"""The softmax of a few rows, over keys that come block by block."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from kernels.decode_attention.scoring import LOG2_E

LANES = 128
# Below every score, and finite: the difference of two is never NaN.
NOTHING = -0.7 * float(jnp.finfo(jnp.float32).max)


def start(top: Any, total: Any) -> None:
    """References of float32 [R, LANES], before the first key."""
    top[...] = jnp.full_like(top, NOTHING)
    total[...] = jnp.zeros_like(total)


def weigh(top: Any, total: Any, at: Any, scores: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Takes in the scores, base 2, of W more keys; W is a multiple of LANES.

    The maximum so far has equal lanes. Each lane keeps a sum of its own, so that no reduction over
    lanes is needed before the end.

    Args:
        top, total: references; `at` are their rows.
        scores: float32 [R, W].

    Returns:
        Weights [R, W] relative to the new maximum, and [R, LANES] of equal lanes, by which what
        was weighed before shrinks.
    """
    old = top[at]
    new = jnp.maximum(old, scores.max(1, keepdims=True))
    weights, shrink = jnp.exp2(scores - wide(new, scores.shape[1])), jnp.exp2(old - new)
    top[at] = new
    total[at] = total[at] * shrink + fold(weights)
    return weights, shrink


def finish(top: jax.Array, total: jax.Array) -> tuple[jax.Array, jax.Array]:
    """What to multiply weighed sums by [R, 1], and the natural log-sum-exp [R, LANES]."""
    total = total.sum(1, keepdims=True)
    empty = total == 0
    total = jnp.where(empty, 1.0, total)
    return 1 / total, jnp.where(empty, NOTHING, (top + jnp.log2(total)) / LOG2_E)


def wide(x: jax.Array, width: int) -> jax.Array:
    """[R, LANES] of equal lanes → [R, width]."""
    return jnp.tile(x, (1, -(-width // LANES)))[:, :width]


def fold(x: jax.Array) -> jax.Array:
    """[R, W] → [R, LANES]: the sum over every LANES-th column."""
    total = x[:, :LANES]
    for i in range(LANES, x.shape[1], LANES):
        total += x[:, i : i + LANES]
    return total

"""From logits to a token: temperature, top-k, top-p, per row of a batch.

Every setting is an array with one entry a row, so that requests of different settings share one
compiled program, and each row draws from its own key: its text does not depend on its neighbours.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sampling:
    """Settings of each row.

    Attributes:
        temperature: divides the logits; 0 is greedy.
        top_k: only the k largest logits (ties are kept); 0: all.
        top_p: the smallest set of most probable tokens whose mass reaches p; 1: all. Smaller
            numbers than float32's smallest normal one are refused: they would count as 0.
        seed: of the row's random draws.
    """

    temperature: Float[Array, "B"]
    top_k: Int[Array, "B"]
    top_p: Float[Array, "B"]
    seed: Int[Array, "B"]

    @classmethod
    def make(
        cls,
        batch: int,
        temperature: float | Sequence[float] = 0.0,
        top_k: int | Sequence[int] = 0,
        top_p: float | Sequence[float] = 1.0,
        seed: int | Sequence[int] = 0,
    ) -> Sampling:
        """From numbers or one number a row; a single seed gives row i the seed + i.

        Raises:
            ValueError: a sequence of another length, or a value out of range.
        """

        def rows(name, value, low, high, dtype):
            x = np.asarray(value, np.float64)
            if x.ndim and x.shape != (batch,):
                raise ValueError(f"{name} has {x.size} values; allowed: one, or {batch} (a row)")
            x = np.broadcast_to(x, (batch,))
            fine = (x >= low) & (x <= high)
            if not fine.all():
                raise ValueError(f"{name}={x[~fine][0]:g}; allowed: [{low:g}, {high:g}]")
            whole = x.astype(dtype)
            if np.issubdtype(dtype, np.integer) and (whole != x).any():
                raise ValueError(f"{name}={x[whole != x][0]:g}; allowed: an integer")
            return whole

        smallest = float(np.finfo(np.float32).tiny)
        seeds = rows("seed", seed, 0, 2**31 - 1, np.int64)
        if np.ndim(seed) == 0:
            seeds = (seeds + np.arange(batch)) % 2**31
        return cls(
            jnp.asarray(rows("temperature", temperature, 0, 1e6, np.float32)),
            jnp.asarray(rows("top_k", top_k, 0, 2**31 - 1, np.int32)),
            jnp.asarray(rows("top_p", top_p, smallest, 1, np.float32)),
            jnp.asarray(seeds.astype(np.int32)),
        )


def truncate(
    logits: Float[Array, "B V"], top_k: Int[Array, "B"], top_p: Float[Array, "B"]
) -> Float[Array, "B V"]:
    """Logits outside of top-k, then outside of top-p of what is left, become -inf.

    Hugging Face's order and semantics: the token that crosses the mass p is kept, so at least one
    always is.
    """
    V = logits.shape[-1]
    ordered = -jnp.sort(-logits, axis=-1)
    k = jnp.where(top_k == 0, V, jnp.minimum(top_k, V))
    kth = jnp.take_along_axis(ordered, k[:, None] - 1, axis=-1)
    ordered = jnp.where(ordered >= kth, ordered, -jnp.inf)
    probs = jax.nn.softmax(ordered, axis=-1)
    before = jnp.cumsum(probs, axis=-1) - probs
    # Rounding can take the mass before a rare token to 1 and past it: p = 1 must cut none.
    inside = (before < top_p[:, None]) | (top_p[:, None] >= 1)
    lowest = jnp.min(jnp.where(inside, ordered, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits >= jnp.maximum(kth, lowest), logits, -jnp.inf)


def sample(
    logits: Float[Array, "B V"], sampling: Sampling, positions: Int[Array, "B"]
) -> Int[Array, "B"]:
    """One token a row; the draw at a position depends on the row's seed and that position only.

    Args:
        logits: float32.
        sampling: settings of each row.
        positions: of the token to be drawn.
    """
    greedy = jnp.argmax(logits, axis=-1).astype(jnp.int32)

    def draw(_):
        warm = logits / jnp.where(sampling.temperature == 0, 1.0, sampling.temperature)[:, None]
        cut = (sampling.top_k != 0) | (sampling.top_p < 1)
        warm = jax.lax.cond(  # sorting the vocabulary is dear, and often not asked for
            cut.any(), lambda x: truncate(x, sampling.top_k, sampling.top_p), lambda x: x, warm
        )
        keys = jax.vmap(lambda s, p: jax.random.fold_in(jax.random.key(s), p))(
            sampling.seed, positions
        )
        noise = jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[-1:]))(keys)
        drawn = jnp.argmax(warm + noise, axis=-1).astype(jnp.int32)
        return jnp.where(sampling.temperature == 0, greedy, drawn)

    return jax.lax.cond((sampling.temperature > 0).any(), draw, lambda _: greedy, None)

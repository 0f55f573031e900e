"""How probable given tokens are, with logits of a few positions at a time."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxlm.model.transformer import Transformer

# Positions of every row whose logits exist at one time.
CHUNK = 64


def token_scores(
    model: Transformer,
    params: Any,
    hidden: Float[Array, "B T D"],
    targets: Int[Array, "B T"],
    chunk: int = CHUNK,
) -> tuple[Float[Array, "B T"], Bool[Array, "B T"]]:
    """Of every target its log-probability, float32, and whether no token is more probable.

    Args:
        model, params: whose head turns hidden states into logits.
        hidden: last hidden states, in the compute dtype.
        targets: the token that follows each.
        chunk: positions of every row whose logits exist at one time; a gradient forms them again.
    """
    B, T = targets.shape
    chunk = min(chunk, T)

    def cut(x: Array) -> Array:
        x = jnp.pad(x, ((0, 0), (0, -T % chunk)) + ((0, 0),) * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(B, -1, chunk, *x.shape[2:]), 1, 0)

    @jax.checkpoint
    def one(h: Array, y: Array) -> tuple[Array, Array]:
        logits = model.apply({"params": params}, h, method="logits")
        picked = jnp.take_along_axis(logits, y[..., None], axis=-1)[..., 0]
        return picked - jax.nn.logsumexp(logits, axis=-1), picked >= logits.max(-1)

    scores = jax.lax.map(lambda part: one(*part), (cut(hidden), cut(targets)))
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(B, -1)[:, :T], scores)

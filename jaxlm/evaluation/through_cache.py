"""How probable a text is as decoding meets it: through a KV cache, a token at a time.

On a cache that keeps all and rounds nothing the losses are those of a full forward; on any other
one the difference is what the cache costs.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxlm.caches.kind import KVCache
from jaxlm.decoding.engine import read
from jaxlm.model.transformer import Transformer


@functools.partial(jax.jit, static_argnums=(0, 3))
def losses_through_cache(
    model: Transformer,
    params: Any,
    tokens: Int[Array, "B T"],
    prompt_length: int,
    cache: KVCache,
) -> Float[Array, "B N"]:
    """Negative log-probability, in nats and float32, of each token behind the prompt, N = T −
    prompt_length.

    Args:
        tokens: rows without padding.
        prompt_length: tokens that are read at once, as a prompt is, 1 or more.
        cache: an empty one of B rows, for T tokens.
    """
    B, T = tokens.shape
    lengths = jnp.full(B, prompt_length, jnp.int32)
    hidden, cache = read(model, params, (tokens[:, :prompt_length], lengths), cache)
    first = model.apply({"params": params}, hidden[:, -1:], method="logits")
    there = jnp.ones((B, 1), jnp.int32)

    def step(carry: tuple[KVCache, Array], at: Array) -> tuple[tuple[KVCache, Array], Array]:
        cache, logits = carry
        token = jax.lax.dynamic_slice_in_dim(tokens, at, 1, 1)
        log_probs = jax.nn.log_softmax(logits[:, 0])
        loss = -jnp.take_along_axis(log_probs, token, 1)[:, 0]
        where = jnp.broadcast_to(at, (B, 1))
        given = (token, where, there, cache)
        logits, kv = model.apply({"params": params}, *given, method="extend")
        return (cache.commit(kv, where, there), logits), loss

    _, losses = jax.lax.scan(step, (cache, first), jnp.arange(prompt_length, T))
    return losses.T

"""How probable a text is as decoding meets it: through a KV cache, one or a few tokens at a time.

On a cache that keeps all and rounds nothing the losses are those of a full forward; on any other
one the difference is what the cache costs. But where an encoding looks at the context's length
(dynamic NTK), a forward pass turns all tokens as the last one is to be; decoding does not.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxlm.caches.kind import CacheKind, KVCache
from jaxlm.caches.on_mesh import commit
from jaxlm.decoding.engine import read
from jaxlm.model.scores import token_scores
from jaxlm.model.transformer import Transformer


@functools.partial(jax.jit, static_argnums=(0, 3, 4, 5))
def losses_through_cache(
    model: Transformer,
    params: Any,
    tokens: Int[Array, "B T"],
    prompt_length: int,
    kind: CacheKind,
    chunk: int = 1,
) -> Float[Array, "B N"]:
    """Negative log-probability, in nats and float32, of each token but the first, N = T − 1.

    Args:
        tokens: rows without padding.
        prompt_length: tokens that are read at once, as a prompt is, 1 to N.
        kind: of the cache, which is made here.
        chunk: tokens that are read at a time behind the prompt, 1 as decoding does. They see each
            other as they are, and what a cache rounds as it was before the first of them.
    """
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    B, N = inputs.shape
    cache = kind.init(model.config, B, N)
    lengths = jnp.full(B, prompt_length, jnp.int32)
    hidden, cache = read(model, params, (inputs[:, :prompt_length], lengths), cache)
    first = -token_scores(model, params, hidden, targets[:, :prompt_length])[0]
    starts = jnp.arange(prompt_length, N, chunk)
    inputs, targets = (jnp.pad(x, ((0, 0), (0, chunk))) for x in (inputs, targets))

    def step(cache: KVCache, start: Array) -> tuple[KVCache, Array]:
        at = jnp.broadcast_to(start + jnp.arange(chunk), (B, chunk))
        there = (at < N).astype(jnp.int32)
        parts = (jax.lax.dynamic_slice_in_dim(x, start, chunk, 1) for x in (inputs, targets))
        tokens, said = parts
        # A learned table has no position for what is behind its end, not even for padding.
        given = (tokens, jnp.where(at < N, at, 0), there, cache)
        hidden, kv = model.apply({"params": params}, *given, method="hidden", return_kv=True)
        return commit(cache, kv, at, there), -token_scores(model, params, hidden, said)[0]

    _, rest = jax.lax.scan(step, cache, starts)
    rest = rest.swapaxes(0, 1).reshape(B, -1)[:, : N - prompt_length]
    return jnp.concatenate([first, rest], 1)

"""The decode loop: prefill, then one jitted `while_loop` over static shapes.

The last token of each row is always still outside the cache: a step feeds it, commits its keys and
values, and draws the next.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from jaxlm.caches.crossed import CrossedCache
from jaxlm.caches.dense import DenseCache
from jaxlm.decoding.sampling import Sampling, sample
from jaxlm.model.encoder_decoder import EncoderDecoder
from jaxlm.model.parameters import Model
from jaxlm.model.transformer import Transformer


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeState:
    """What the loop carries; every buffer is donated from call to call.

    Attributes:
        tokens: drawn so far, [batch, max_new_tokens]; stop tokens are included.
        count: columns of `tokens` that are filled.
        lengths: tokens of each row, prompt included and the last one too.
        done: rows that drew a stop token; what they hold after it is padding.
        cache: of all tokens but the last.
    """

    tokens: Int[Array, "B M"]
    count: Int[Array, ""]
    lengths: Int[Array, "B"]
    done: Bool[Array, "B"]
    cache: Any


def _draw(state, logits, sampling, stop_tokens) -> DecodeState:
    """Draws every row's next token and writes it down."""
    token = sample(logits, sampling, state.lengths)
    token = jnp.where(state.done, 0, token)
    stopped = (token[:, None] == stop_tokens[None]).any(-1) & ~state.done
    return dataclasses.replace(
        state,
        tokens=jax.lax.dynamic_update_slice(state.tokens, token[:, None], (0, state.count)),
        count=state.count + 1,
        lengths=state.lengths + jnp.where(state.done, 0, 1),
        done=state.done | stopped,
    )


@functools.partial(jax.jit, static_argnums=(0, 4), donate_argnums=(3,))
def prefill(
    model: Transformer,
    params: Any,
    prompt: tuple[Int[Array, "B T"], Int[Array, "B"]],
    cache: DenseCache,
    max_new_tokens: int,
    sampling: Sampling,
    stop_tokens: Int[Array, "E"],
) -> DecodeState:
    """Reads left-padded prompts = (tokens, true lengths) and draws the first token."""
    tokens, lengths = prompt
    T = tokens.shape[1]
    positions = jnp.arange(T)[None] - (T - lengths)[:, None]
    segments = (positions >= 0).astype(jnp.int32)
    positions = jnp.maximum(positions, 0)
    hidden, (keys, values) = model.apply(
        {"params": params}, tokens, positions, segments, method="hidden", return_kv=True
    )
    logits = model.apply({"params": params}, hidden[:, -1:], method="logits")[:, 0]
    B = tokens.shape[0]
    state = DecodeState(
        tokens=jnp.zeros((B, max_new_tokens), jnp.int32),
        count=jnp.zeros((), jnp.int32),
        lengths=lengths,
        done=jnp.zeros(B, bool),
        cache=cache.commit(keys, values, positions, segments),
    )
    return _draw(state, logits, sampling, stop_tokens)


@functools.partial(jax.jit, static_argnums=(0, 3))
def prefill_encoded(
    model: EncoderDecoder,
    params: Any,
    prompt: tuple[Int[Array, "B S"], Int[Array, "B"]],
    max_new_tokens: int,
    sampling: Sampling,
    stop_tokens: Int[Array, "E"],
) -> DecodeState:
    """Encodes left-padded inputs = (tokens, true lengths) and draws the first token."""
    tokens, lengths = prompt
    B, S = tokens.shape
    positions = jnp.arange(S)[None] - (S - lengths)[:, None]
    segments = (positions >= 0).astype(jnp.int32)
    positions = jnp.maximum(positions, 0)
    hidden = model.apply({"params": params}, tokens, segments, positions, method="encode")
    start = jnp.full((B, 1), model.config.start_token, jnp.int32)
    cache = CrossedCache.init(model.config.decoder, B, max_new_tokens)
    logits, cache = model.apply({"params": params}, start, hidden, segments, cache, method="decode")
    state = DecodeState(
        tokens=jnp.zeros((B, max_new_tokens), jnp.int32),
        count=jnp.zeros((), jnp.int32),
        lengths=jnp.ones(B, jnp.int32),
        done=jnp.zeros(B, bool),
        cache=cache,
    )
    return _draw(state, logits[:, 0], sampling, stop_tokens)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def decode(
    model: Model,
    params: Any,
    state: DecodeState,
    until: Int[Array, ""],
    sampling: Sampling,
    stop_tokens: Int[Array, "E"],
) -> DecodeState:
    """Draws tokens until `until` of them are there or every row is done."""

    method = "decode" if isinstance(model, EncoderDecoder) else None

    def more(state: DecodeState) -> Array:
        return (state.count < until) & ~state.done.all()

    def step(state: DecodeState) -> DecodeState:
        last = jax.lax.dynamic_slice_in_dim(state.tokens, state.count - 1, 1, axis=1)
        at = state.lengths[:, None] - 1
        logits, cache = model.apply(
            {"params": params}, last, positions=at, cache=state.cache, method=method
        )
        state = dataclasses.replace(state, cache=cache)
        return _draw(state, logits[:, 0], sampling, stop_tokens)

    return jax.lax.while_loop(more, step, state)

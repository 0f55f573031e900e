"""The decode loop: prefill, then one jitted `while_loop` over static shapes.

A step is draft → verify → accept → commit: guesses of the next tokens hang as a tree below the last
token of each row, the model reads the tree at once, and the way down that it agrees with becomes
tokens, whose keys and values alone enter the cache. Plain decoding is the tree of the root alone.

The last token of each row, the root, is always still outside of the cache.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxlm.caches.crossed import CrossedCache
from jaxlm.caches.kind import KVCache
from jaxlm.caches.rows import write_rows
from jaxlm.decoding.acceptance import Accepted, accept
from jaxlm.decoding.drafters.drafter import Drafter
from jaxlm.decoding.drafters.plain import PLAIN
from jaxlm.decoding.sampling import Sampling, sample
from jaxlm.decoding.tree import Draft, ancestors
from jaxlm.model.encoder_decoder import EncoderDecoder
from jaxlm.model.parameters import Model
from jaxlm.model.transformer import Transformer


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeState:
    """What the loop carries; every buffer is donated from call to call.

    Attributes:
        tokens: drawn so far, stop tokens included, with room for a last draft that is too long.
        drawn: how many of them each row has.
        lengths: tokens of each row, prompt included and the last one too.
        done: rows that drew a stop token.
        cache: of all tokens but the last.
        steps: calls of the model since the prompt was read.
        limit: most tokens to draw. Static.
    """

    tokens: Int[Array, "B M"]
    drawn: Int[Array, "B"]
    lengths: Int[Array, "B"]
    done: Bool[Array, "B"]
    cache: Any
    steps: Int[Array, ""]
    limit: int = dataclasses.field(metadata={"static": True})


def _write(
    state: DecodeState, new: Int[Array, "B D"], count: Int[Array, "B"], stops: Int[Array, "E"]
) -> DecodeState:
    """Writes down the first `count` of each row's new tokens, up to a stop token or the limit."""
    at = jnp.arange(new.shape[1])[None]
    stop = (new[:, :, None] == stops[None, None]).any(-1)
    before = jnp.cumsum(stop, 1) - stop.astype(jnp.int32)  # stop tokens in front of each
    left = jnp.minimum(count, state.limit - state.drawn)
    kept = (at < left[:, None]) & (before == 0) & ~state.done[:, None]
    count = kept.sum(1, dtype=jnp.int32)
    return dataclasses.replace(
        state,
        tokens=write_rows(state.tokens, jnp.where(kept, new, 0), state.drawn),
        drawn=state.drawn + count,
        lengths=state.lengths + count,
        done=state.done | (stop & kept).any(1),
    )


def _start(lengths: Int[Array, "B"], cache: Any, limit: int, depth: int) -> DecodeState:
    """Before the first token."""
    B = lengths.shape[0]
    tokens = jnp.zeros((B, limit + depth + 1), jnp.int32)
    none = jnp.zeros(B, jnp.int32)
    steps = jnp.zeros((), jnp.int32)
    return DecodeState(tokens, none, lengths, jnp.zeros(B, bool), cache, steps, limit)


@functools.partial(jax.jit, static_argnums=(0, 4, 7), donate_argnums=(3,))
def prefill(
    model: Transformer,
    params: Any,
    prompt: tuple[Int[Array, "B T"], Int[Array, "B"]],
    cache: KVCache,
    max_new_tokens: int,
    sampling: Sampling,
    stop_tokens: Int[Array, "E"],
    drafter: Drafter = PLAIN,
) -> DecodeState:
    """Reads prompts = (tokens, true lengths), padded behind, and draws the first token."""
    hidden, cache = read(model, params, prompt, cache)
    lengths = prompt[1]
    last = jnp.take_along_axis(hidden, lengths[:, None, None] - 1, 1)
    logits = model.apply({"params": params}, last, method="logits")
    state = _start(lengths, cache, max_new_tokens, drafter.depth)
    first = sample(logits[:, 0], sampling, lengths)
    return _write(state, first[:, None], jnp.ones_like(lengths), stop_tokens)


def read(
    model: Transformer,
    params: Any,
    prompt: tuple[Int[Array, "B T"], Int[Array, "B"]],
    cache: KVCache,
) -> tuple[Float[Array, "B T D"], KVCache]:
    """The last hidden states of prompts = (tokens, true lengths), padded behind, and the cache with
    all their tokens.
    """
    tokens, lengths = prompt
    positions, segments = _counted(tokens, lengths)
    hidden, kv = model.apply(
        {"params": params},
        tokens,
        positions,
        segments,
        method="hidden",
        return_kv=True,
        kept=cache.mask,
    )
    return hidden, cache.commit(kv, positions, segments)


@functools.partial(jax.jit, static_argnums=(0, 3))
def prefill_encoded(
    model: EncoderDecoder,
    params: Any,
    prompt: tuple[Int[Array, "B S"], Int[Array, "B"]],
    max_new_tokens: int,
    sampling: Sampling,
    stop_tokens: Int[Array, "E"],
) -> DecodeState:
    """Encodes inputs = (tokens, true lengths), padded behind, and draws the first token."""
    tokens, lengths = prompt
    positions, segments = _counted(tokens, lengths)
    hidden = model.apply({"params": params}, tokens, segments, positions, method="encode")
    one = jnp.ones(tokens.shape[0], jnp.int32)
    start = one[:, None] * model.config.start_token
    cache = CrossedCache.init(model.config.decoder, len(tokens), max_new_tokens)
    logits, cache = model.apply({"params": params}, start, hidden, segments, cache, method="decode")
    state = _start(one, cache, max_new_tokens, 0)
    first = sample(logits[:, 0], sampling, one)
    return _write(state, first[:, None], one, stop_tokens)


@functools.partial(jax.jit, static_argnums=(0, 6), donate_argnums=2)
def decode(
    model: Model,
    params: Any,
    state: DecodeState,
    until: Int[Array, ""],
    sampling: Sampling,
    stop_tokens: Int[Array, "E"],
    drafter: Drafter = PLAIN,
) -> DecodeState:
    """Draws tokens until each row has `until` of them or is done."""

    def more(state: DecodeState) -> Array:
        return ((state.drawn < until) & ~state.done).any()

    def step(state: DecodeState) -> DecodeState:
        draft = drafter.propose(_last(state), state.lengths)
        accepted, new, cache = verify(model, params, state, draft, sampling)
        state = dataclasses.replace(state, cache=cache, steps=state.steps + 1)
        return _write(state, new, accepted.length, stop_tokens)

    return jax.lax.while_loop(more, step, state)


def verify(
    model: Model, params: Any, state: DecodeState, draft: Draft, sampling: Sampling
) -> tuple[Accepted, Int[Array, "B D"], Any]:
    """Reads the draft, and commits the part that the model agrees with.

    Returns:
        What is accepted; the new tokens, `length` of them; the cache with the root and all of the
        new ones but the last.
    """
    depths, way = ancestors(draft)
    if (most := state.cache.appendable) is not None:
        draft = dataclasses.replace(draft, valid=draft.valid & (depths <= most[:, None]))
    at = state.lengths[:, None] + depths
    going = ~state.done & (state.drawn < state.limit)
    there = (draft.valid & going[:, None]).astype(jnp.int32)
    tree = None if draft.depth == 0 else way
    logits, kv = model.apply(
        {"params": params}, draft.tokens, at - 1, there, state.cache, tree, method="extend"
    )
    B, T, V = logits.shape
    settings = jax.tree.map(lambda a: jnp.repeat(a, T), sampling)
    choices = sample(logits.reshape(B * T, V), settings, at.reshape(-1)).reshape(B, T)
    accepted = accept(choices, draft)
    path = accepted.path
    if draft.depth:
        kv = jax.tree.map(lambda a: jnp.take_along_axis(a, path[None, :, :, None, None], 2), kv)
    order = jnp.arange(path.shape[1])[None]
    kept = (order < accepted.length[:, None]) & going[:, None]
    positions = state.lengths[:, None] - 1 + order
    cache = state.cache.commit(kv, positions, kept.astype(jnp.int32))
    said = jnp.take_along_axis(draft.tokens, jnp.roll(path, -1, axis=1), 1)
    new = jnp.where(order == accepted.length[:, None] - 1, accepted.token[:, None], said)
    return accepted, new, cache


def _last(state: DecodeState) -> Int[Array, "B"]:
    """Each row's newest token."""
    return jnp.take_along_axis(state.tokens, state.drawn[:, None] - 1, 1)[:, 0]


def _counted(tokens: Array, lengths: Array) -> tuple[Array, Array]:
    """Positions and segment ids of rows that are padded behind."""
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1])[None], tokens.shape)
    return positions, (positions < lengths[:, None]).astype(jnp.int32)

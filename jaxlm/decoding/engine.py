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
from jaxtyping import Array, Float, Int

from jaxlm.caches.crossed import CrossedCache
from jaxlm.caches.kind import KVCache
from jaxlm.caches.on_mesh import commit
from jaxlm.decoding.acceptance import Accepted, accept
from jaxlm.decoding.drafters.drafter import Drafter
from jaxlm.decoding.drafters.plain import PLAIN
from jaxlm.decoding.sampling import Sampling, sample
from jaxlm.decoding.state import DecodeState, begin, write
from jaxlm.decoding.tree import Draft, ancestors
from jaxlm.model.encoder_decoder import EncoderDecoder
from jaxlm.model.parameters import Model
from jaxlm.model.transformer import Transformer


@functools.partial(jax.jit, static_argnums=(0, 4, 7, 8), donate_argnums=(3,))
def prefill(
    model: Transformer,
    params: Any,
    prompt: tuple[Int[Array, "P T"], Int[Array, "P"]],
    cache: KVCache,
    max_new_tokens: int,
    sampling: Sampling,
    stop_tokens: Int[Array, "E"],
    drafter: Drafter = PLAIN,
    logprobs: int | None = None,
) -> DecodeState:
    """Reads prompts = (tokens, true lengths), padded behind, and draws the first token.

    Args:
        logprobs: of how many most probable tokens to keep them, beside those drawn; None: of none.
    """
    rest = (max_new_tokens, sampling, stop_tokens, drafter.depth, logprobs)
    return _read_and_begin(model, params, prompt, cache, *rest)


@functools.partial(jax.jit, static_argnums=(0, 4, 7))
def prefill_shared(
    model: Transformer,
    params: Any,
    prompt: tuple[Int[Array, "P T"], Int[Array, "P"]],
    cache: KVCache,
    max_new_tokens: int,
    sampling: Sampling,
    stop_tokens: Int[Array, "E"],
    logprobs: int | None = None,
) -> DecodeState:
    """`prefill` where `sampling` has more rows than there are prompts: as many of them in turn
    continue each. A cache that fewer rows go into than come out of is not donated.
    """
    rest = (max_new_tokens, sampling, stop_tokens, 0, logprobs)
    return _read_and_begin(model, params, prompt, cache, *rest)


def _read_and_begin(
    model: Transformer,
    params: Any,
    prompt: tuple[Int[Array, "P T"], Int[Array, "P"]],
    cache: KVCache,
    limit: int,
    sampling: Sampling,
    stops: Int[Array, "E"],
    depth: int,
    logprobs: int | None,
) -> DecodeState:
    hidden, cache = read(model, params, prompt, cache)
    last = jnp.take_along_axis(hidden, prompt[1][:, None, None] - 1, 1)
    logits = model.apply({"params": params}, last, method="logits")[:, 0]
    (logits, prompt), cache = _shared((logits, prompt), cache, sampling)
    return begin(logits, prompt, cache, sampling, stops, limit, depth, logprobs)


def _shared(of_prompts: Any, cache: Any, sampling: Sampling) -> tuple[Any, Any]:
    """The same for each of the rows that continue a prompt."""
    prompts = of_prompts[0].shape[0]
    copies = sampling.seed.shape[0] // prompts
    if copies == 1:
        return of_prompts, cache
    rows = jnp.repeat(jnp.arange(prompts), copies)
    return jax.tree.map(lambda a: a[rows], of_prompts), cache.reorder(rows)


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
    return hidden, commit(cache, kv, positions, segments)


@functools.partial(jax.jit, static_argnums=(0, 3, 6))
def prefill_encoded(
    model: EncoderDecoder,
    params: Any,
    prompt: tuple[Int[Array, "P S"], Int[Array, "P"]],
    max_new_tokens: int,
    sampling: Sampling,
    stop_tokens: Int[Array, "E"],
    logprobs: int | None = None,
) -> DecodeState:
    """Encodes inputs = (tokens, true lengths), padded behind, and draws the first token; see
    `prefill`.
    """
    tokens, lengths = prompt
    positions, segments = _counted(tokens, lengths)
    hidden = model.apply({"params": params}, tokens, segments, positions, method="encode")
    one = jnp.ones(tokens.shape[0], jnp.int32)
    start = one[:, None] * model.config.start_token
    cache = CrossedCache.init(model.config.decoder, len(tokens), max_new_tokens)
    logits, cache = model.apply({"params": params}, start, hidden, segments, cache, method="decode")
    (logits, text), cache = _shared((logits[:, 0], (start, one)), cache, sampling)
    return begin(logits, text, cache, sampling, stop_tokens, max_new_tokens, 0, logprobs)


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
        accepted, new, cache, logits = verify(model, params, state, draft, sampling)
        state = dataclasses.replace(state, cache=cache, steps=state.steps + 1)
        return write(state, new, accepted.length, stop_tokens, logits)

    return jax.lax.while_loop(more, step, state)


def verify(
    model: Model, params: Any, state: DecodeState, draft: Draft, sampling: Sampling
) -> tuple[Accepted, Int[Array, "B D"], Any, Float[Array, "B D V"]]:
    """Reads the draft, and commits the part that the model agrees with.

    Returns:
        What is accepted; the new tokens, `length` of them; the cache with the root and all of the
        new ones but the last; the logits that each new token was drawn from.
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
    past = state.history.past_of_nodes(state.drawn, state.lengths, draft, depths, way)
    nodes = logits.reshape(B * T, V)
    choices = sample(nodes, sampling.repeat(T), at.reshape(-1), past).reshape(B, T)
    accepted = accept(choices, draft)
    path = accepted.path
    if draft.depth:
        kv = jax.tree.map(lambda a: jnp.take_along_axis(a, path[None, :, :, None, None], 2), kv)
        logits = jnp.take_along_axis(logits, path[:, :, None], 1)
    order = jnp.arange(path.shape[1])[None]
    kept = (order < accepted.length[:, None]) & going[:, None]
    positions = state.lengths[:, None] - 1 + order
    kv = _behind(accepted.token, kv)
    cache = commit(state.cache, kv, positions, kept.astype(jnp.int32))
    said = jnp.take_along_axis(draft.tokens, jnp.roll(path, -1, axis=1), 1)
    new = jnp.where(order == accepted.length[:, None] - 1, accepted.token[:, None], said)
    return accepted, new, cache, logits


def _last(state: DecodeState) -> Int[Array, "B"]:
    """Each row's newest token."""
    return jnp.take_along_axis(state.tokens, state.drawn[:, None] - 1, 1)[:, 0]


def _counted(tokens: Array, lengths: Array) -> tuple[Array, Array]:
    """Positions and segment ids of rows that are padded behind."""
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1])[None], tokens.shape)
    return positions, (positions < lengths[:, None]).astype(jnp.int32)


def _behind(token: Int[Array, "B"], kv: tuple[Array, ...]) -> tuple[Array, ...]:
    """The same keys and values, but known only when the token is, which no token below 0 is.

    The last layer's are known before its queries have read the cache, and XLA then copies the whole
    of it, so that it can be written to at the same time.
    """
    known = (token >= 0)[None, :, None, None, None]
    return jax.tree.map(lambda a: jnp.where(known, a, jnp.zeros((), a.dtype)), kv)

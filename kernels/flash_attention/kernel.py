"""One differentiable call: the forward kernel, and the backward kernels as its gradient rule."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kernels.flash_attention import backward, fire, forward, places, sinks_backward
from kernels.flash_attention.backward import Cotangents
from kernels.flash_attention.bias import of_distance
from kernels.flash_attention.blocks import Blocks
from kernels.flash_attention.call import HIDDEN, LOG2_E, Call
from kernels.flash_attention.operands import Arrays, Far, Segments, query_ids
from kernels.flash_attention.pattern import Band
from kernels.flash_attention.places import At, Places, Rule
from kernels.flash_attention.segments import block_bounds, slots_of
from kernels.flash_attention.sinks import SinkRows, find_sinks, first_tokens, gather, scatter


@dataclasses.dataclass(frozen=True)
class Settings:
    """The static half of a call: hashable.

    Attributes:
        ahead: keys after the query that it sees, 0 is causal; None: all.
        window: keys up to the query that it sees, its own included; None: all.
        scale: multiplies q·k.
        precision: of all matrix products, those of the backward pass too.
        softcap: scores become softcap·tanh(scores / softcap); None: they don't.
        prefix: positions below it are seen by all; None: none are.
        num_sinks: positions below it are seen from any distance.
        learned_bias: whether the bias' gradient is worked out: it costs as much as a product.
        strides: whether the chip turns the rows of a tile by a stride; v4 does not.
        blocks: sizes of the forward and of the backward kernel.
        rule: what positions say, where they are data; None: they follow the slots.
    """

    ahead: int | None
    window: int | None
    scale: float
    precision: jax.lax.Precision
    softcap: float | None
    prefix: int | None
    num_sinks: int
    learned_bias: bool
    strides: bool
    blocks: tuple[Blocks, Blocks]
    rule: Rule | None = None


class Trained(NamedTuple):
    """What has a gradient, and factors and slopes, whose is 0; see `flash_attention`. Lengths are
    whole blocks and stretches here.
    """

    q: Any
    k: Any
    v: Any
    q_far: Any = None
    k_far: Any = None
    bias: Any = None
    far_bias: Any = None
    factor: Any = None
    far_factor: Any = None
    fire: Any = None
    slopes: Any = None


class Tokens(NamedTuple):
    """What has none: int32 [batch, length of the keys], the first query's slot, or None, and where
    the queries are, if that is data.
    """

    segment_ids: Any
    positions: Any
    first_query: Any
    queries: At | None = None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def attend(settings: Settings, x: Trained, tokens: Tokens) -> tuple[jax.Array, jax.Array]:
    """See `flash_attention`."""
    call = _call(settings, 0, x, tokens)
    return forward.run(call, _arrays(call, x, tokens))


def _call(settings: Settings, side: int, x: Trained, tokens: Tokens) -> Call:
    """Of the forward kernel (side 0), or of the backward kernels (1)."""
    H = x.q.shape[3]
    s, n = settings, settings.blocks[side]
    length = (x.q if tokens.first_query is None else x.k).shape[2]
    keys = length if s.rule is None else x.k.shape[2]
    band = Band(s.ahead, s.window, n.block_q, n.block_k, length // n.block_q, keys // n.block_k)
    segments = tokens.segment_ids is not None
    options = (s.softcap, segments, s.prefix, s.num_sinks, s.strides)
    sizes = x.k.shape[2], x.q.shape[2] // n.block_q
    return Call(band, n, H, s.scale, s.precision, *options, *sizes, s.rule)


def _arrays(call: Call, x: Trained, tokens: Tokens) -> Arrays:
    if call.rule is not None:
        return _placed_arrays(call, call.rule, x, tokens)
    (ids, positions, first, _), n, T = tokens, call.blocks, x.q.shape[2]
    first_block = None if first is None else first // n.block_q
    segments = is_open = far = None
    if ids is not None:
        open_ends = None
        if call.prefix is not None:
            open_ends = (slots_of(ids) - positions + call.prefix)[:, : call.length]
        bounds = block_bounds(ids[:, : call.length], open_ends, n.block_q, n.block_k)
        bounds = _part(bounds, first_block, T // n.block_q)
        segments = Segments(query_ids(_part(ids, first, T)), ids, bounds)
    if call.prefix is not None:
        is_open = (positions < call.prefix).astype(jnp.int32)
    if call.num_sinks:
        if ids is None:
            sinks = first_tokens(x.q.shape[0], call.num_sinks)
        else:
            own = ids[:, : call.length], positions[:, : call.length]
            sinks = find_sinks(*own, call.num_sinks, n.block_q)
            sinks = jax.tree.map(lambda a: _part(a, first_block, T // n.block_q), sinks)
        far = Far(
            x.q_far,
            gather(x.k_far, sinks),
            gather(x.v, sinks),
            sinks,
            _rows(x.far_bias.astype(jnp.float32) * LOG2_E, sinks),
            None if x.far_factor is None else _rows(x.far_factor.astype(jnp.float32), sinks),
        )
    if first_block is not None:
        first_block = first_block.reshape(1)
    bias = None if x.bias is None else x.bias.astype(jnp.float32) * LOG2_E
    return Arrays(x.q, x.k, x.v, first_block, segments, is_open, bias, x.factor, far, x.fire)


def _placed_arrays(call: Call, rule: Rule, x: Trained, tokens: Tokens) -> Arrays:
    q, k, n = tokens.queries, At(tokens.positions, tokens.segment_ids), call.blocks
    assert q is not None
    state = places.states(rule.mask, q, k, n.block_q, n.block_k)
    segments = Segments(query_ids(q.segment_ids), k.segment_ids, places.bounds(state))
    slopes = None if x.slopes is None else x.slopes.astype(jnp.float32) * LOG2_E
    own = Places(q.positions, k.positions, places.in_words(state), slopes)
    return Arrays(x.q, x.k, x.v, None, segments, None, None, None, None, None, own)


def _rows(of_heads: jax.Array, sinks: SinkRows) -> jax.Array:
    """[N] → [N, 1, sinks], equal along the last axis."""
    return jnp.broadcast_to(of_heads[:, None, None], (of_heads.size, 1, sinks.slots.shape[2]))


def _part(x: jax.Array, first: jax.Array | None, size: int) -> jax.Array:
    """`size` entries of the second axis: those from `first` on, or the first."""
    return x[:, :size] if first is None else jax.lax.dynamic_slice_in_dim(x, first, size, axis=1)


def _forward(settings: Settings, x: Trained, tokens: Tokens) -> Any:
    out = attend(settings, x, tokens)
    return out, (x, tokens, *out)


def _backward(settings: Settings, saved: Any, cotangents: Any) -> Any:
    x, tokens, out, lse = saved
    d_out, d_lse = cotangents
    call = _call(settings, 1, x, tokens)
    arrays = _arrays(call, x, tokens)
    rest = d_lse - (d_out.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1)
    # A query that sees nothing has the log-sum-exp HIDDEN, which base 2 would make infinite.
    rows = jnp.where(lse == HIDDEN, 0.0, lse * LOG2_E)
    d = Cotangents(d_out.astype(x.q.dtype), rows[:, :, None], rest[:, :, None])
    learned = x.bias is not None and settings.learned_bias
    found = backward.run(call, arrays, d, learned)
    grads = Trained(found.q, found.k, found.v)
    if found.fire is not None:
        grads = grads._replace(fire=fire.gradients(x.fire, found.fire))
    if learned:
        d_bias = of_distance(found.bias, call.reach, (x.bias.shape[1] + 1) // 2)
        grads = grads._replace(bias=d_bias.astype(x.bias.dtype))
    elif x.bias is not None:
        grads = grads._replace(bias=jnp.zeros_like(x.bias))
    if arrays.far is not None:
        dq_far, dk_far, dv_far, d_far_bias = sinks_backward.run(call, arrays, arrays.far, d)
        S = x.k.shape[2]
        dk_far, dv_far = (scatter(part, arrays.far.sinks, S) for part in (dk_far, dv_far))
        grads = grads._replace(
            v=(grads.v.astype(jnp.float32) + dv_far).astype(grads.v.dtype),
            q_far=dq_far,
            k_far=dk_far.astype(x.k.dtype),
            far_bias=d_far_bias.astype(x.far_bias.dtype),
        )
    return grads, jax.tree.map(lambda a: None, tokens)


attend.defvjp(_forward, _backward)

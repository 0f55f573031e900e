"""Attention in O(T) memory: exact softmax tile by tile, hidden tiles skipped.

Online softmax and recomputation in the backward pass as in FlashAttention (Dao et al. 2022, arXiv
2205.14135, algorithms 1 and 4). Three nested loops: over rows (batch × groups of heads), over query
blocks, and over the key blocks that the mask leaves to each of them. So compile time does not grow
with length, and cost follows the mask. Pairs at the distance ceiling are a second pass over the
same running softmax, with the other queries and keys.

Letters: B batch, C head groups, n query heads of a group, P its kv heads, R = n / P · block_q rows,
I query blocks, J key blocks, k = block_k keys, H head dim.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxlm.attention.blockwise_tiles import (
    DEFAULT_BLOCKS,
    Blocks,
    Tiling,
    Tokens,
    Visits,
    choose_tiling,
    from_blocks,
    from_rows,
    has_far_pass,
    plan,
    split_tokens,
    to_blocks,
    to_rows,
)
from jaxlm.attention.inputs import AttentionInputs, AttentionSpec
from jaxlm.attention.on_mesh import Axes, attend_on_mesh
from jaxlm.attention.reference import HIDDEN


class Arrays(NamedTuple):
    """What has a gradient. `q` and `k` hold one array a pass: near and, where given, far."""

    q: tuple[Array, ...]
    k: tuple[Array, ...]
    v: Array
    head_parameters: Any
    sink_logits: Array | None


class Layout(NamedTuple):
    """What has none: the tokens, blocked, and the tiles of each pass; leading axis B."""

    q: Tokens
    k: Tokens
    passes: tuple[Visits, ...]


QUERIES: Axes = ("batch", "length", "kv_heads")
KEYS: Axes = ("batch", None, "kv_heads")
# Of what is not a head's: see `AttentionInputs`.
AXES = dict.fromkeys(("q", "q_far"), QUERIES) | dict.fromkeys(("k", "k_far", "v"), KEYS)
AXES |= dict.fromkeys(("q_positions", "q_segment_ids", "tree"), QUERIES[:2])
AXES |= dict.fromkeys(("k_positions", "k_segment_ids"), KEYS[:1])


def attend_blockwise(
    spec: AttentionSpec, x: AttentionInputs, blocks: Blocks = DEFAULT_BLOCKS
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
    """Softmax attention in O(T + S) memory, forward and backward.

    One integer per tile comes on top: to 65536 pairs at the default block sizes. On a mesh set by
    `jax.set_mesh`, each device attends for its rows, its heads and its part of a row's queries, to
    the keys and values of all: XLA would gather what a loop over rows is cut along.

    Returns:
        As `attend_reference`: output in q's dtype and float32 log-sum-exp.
    """

    def here(part: AttentionInputs) -> tuple[Array, Array]:
        aligned = spec.aligned and part.q.shape[1] == x.q.shape[1]
        return attend_here(dataclasses.replace(spec, aligned=aligned), part, blocks)

    return attend_on_mesh(here, x, AXES)


def attend_here(
    spec: AttentionSpec, x: AttentionInputs, blocks: Blocks = DEFAULT_BLOCKS
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
    """The same on one device, whatever the mesh."""
    tiling, far = choose_tiling(x, blocks), has_far_pass(spec, x)
    q_tokens = split_tokens(x.q_positions, x.q_segment_ids, tiling.block_q)
    k_tokens = split_tokens(x.k_positions, x.k_segment_ids, tiling.block_k)
    layout = Layout(q_tokens, k_tokens, plan(spec, q_tokens, k_tokens, far))
    q: tuple[Any, ...] = (x.q, x.q_far) if far else (x.q,)
    k: tuple[Any, ...] = (x.k, x.k_far) if far else (x.k,)
    return _attend(spec, tiling, Arrays(q, k, x.v, x.head_parameters, x.sink_logits), layout)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(spec: AttentionSpec, tiling: Tiling, x: Arrays, layout: Layout) -> Any:
    return _forward(spec, tiling, x, layout)[0]


class Row(NamedTuple):
    """One row of the batch and one group of heads, in blocks."""

    arrays: Arrays  # q [I P R H], k and v [J P k H], the rest [n, ...]
    layout: Layout
    group: Array


class QueryBlock(NamedTuple):
    """One query block of a row."""

    q: tuple[Float[Array, "P R H"], ...]
    tokens: Tokens
    visits: tuple[Visits, ...]


def _pick(tree: Any, i: Array) -> Any:
    """Entry i of every array: a slice, where indexing would make a gather."""
    return jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, i, keepdims=False), tree)


def _add(a: Array, i: Array, value: Array) -> Array:
    """a with a[i] += value, in place inside a loop."""
    return jax.lax.dynamic_update_index_in_dim(a, _pick(a, i) + value, i, 0)


def _by_group(tiling: Tiling, per_head: Any) -> Any:
    """[N, ...] → [C, n, ...]."""
    return jax.tree.map(lambda a: a.reshape(tiling.groups, -1, *a.shape[1:]), per_head)


def _rows(tiling: Tiling, x: Arrays) -> tuple[Array, Any]:
    """The row numbers and the arrays [BC T n H], to scan over."""
    q, k, v = (
        jax.tree.map(functools.partial(to_rows, tiling=tiling, block=block), a)
        for a, block in ((x.q, tiling.block_q), (x.k, tiling.block_k), (x.v, tiling.block_k))
    )
    return jnp.arange(v.shape[0], dtype=jnp.int32), (q, k, v)


def _open(tiling: Tiling, x: Arrays, layout: Layout, row: tuple[Array, Any]) -> Row:
    """The row that scan hands over."""
    number, (q, k, v) = row
    group = number % tiling.groups
    parameters, sinks = _pick(_by_group(tiling, (x.head_parameters, x.sink_logits)), group)
    arrays = Arrays(
        tuple(to_blocks(a, tiling, tiling.block_q) for a in q),
        tuple(to_blocks(a, tiling, tiling.block_k) for a in k),
        to_blocks(v, tiling, tiling.block_k),
        parameters,
        sinks,
    )
    return Row(arrays, _pick(layout, number // tiling.groups), group)


def _query_blocks(row: Row) -> QueryBlock:
    """All of them, to scan over."""
    return QueryBlock(row.arrays.q, row.layout.q, row.layout.passes)


def _dot(equation: str, a: Array, b: Array) -> Array:
    """In float32 throughout: CPUs have no product of bfloat16 that is summed in float32."""
    return jnp.einsum(equation, a.astype(jnp.float32), b.astype(jnp.float32))


def _scores(
    spec: AttentionSpec, q: Tokens, k: Tokens, parameters: Any, dots: Float[Array, "P R k"]
) -> Float[Array, "P R k"]:
    """q·k → scaled, capped, and changed by the position encoding, head by head."""
    s = dots * spec.scale
    if spec.softcap is not None:
        s = spec.softcap * jnp.tanh(s / spec.softcap)
    if spec.score is None:
        return s
    i, j = q.positions[:, None], k.positions[None, :]
    distance = i - j if spec.ceiling is None else jnp.minimum(i - j, spec.ceiling)
    by_head = s.reshape(-1, *distance.shape)
    s = jax.vmap(spec.score, in_axes=(0, 0, None, None))(parameters, by_head, distance, i)
    return s.reshape(dots.shape)


def _hide(
    spec: AttentionSpec, q: Tokens, k: Tokens, far: bool | None, s: Float[Array, "P R k"]
) -> Float[Array, "P R k"]:
    """-inf where the query may not see the key in this pass (None: the only one)."""
    i, j = q.positions[:, None], k.positions[None, :]
    same = q.segments[:, None] == k.segments[None, :]
    seen = spec.mask.visible(i, j) & same & (k.segments != 0)[None, :]
    if far is not None:
        assert spec.ceiling is not None
        seen = seen & (i - j >= spec.ceiling if far else i - j < spec.ceiling)
    P, R, _ = s.shape
    seen = jnp.broadcast_to(seen[None, None], (P, R // len(i), *seen.shape)).reshape(s.shape)
    return jnp.where(seen, s, -jnp.inf)


def _sides(block: QueryBlock) -> tuple[bool | None, ...]:
    """Each pass's answer to: only the pairs at the ceiling, only those below, or all (None)?"""
    return (False, True) if len(block.visits) > 1 else (None,)


def _forward_block(spec: AttentionSpec, row: Row, block: QueryBlock) -> tuple[Array, Array]:
    """Output [P R H] and log-sum-exp [P R] of one query block."""
    x, sides = row.arrays, _sides(block)

    def visit(side: int, n: Array, state: Any) -> Any:
        top, total, out = state
        k, v, others = _pick((x.k[side], x.v, row.layout.k), _pick(block.visits[side].order, n))
        dots = _dot("prh,pkh->prk", block.q[side], k)
        s = _scores(spec, block.tokens, others, x.head_parameters, dots)
        s = _hide(spec, block.tokens, others, sides[side], s)
        new = jnp.maximum(top, s.max(-1))
        p, shrink = jnp.exp(s - new[..., None]), jnp.exp(top - new)
        value = _dot("prk,pkh->prh", p, v)
        return new, total * shrink + p.sum(-1), out * shrink[..., None] + value

    shape = block.q[0].shape
    state = (
        jnp.full(shape[:-1], HIDDEN, jnp.float32),
        jnp.zeros(shape[:-1], jnp.float32),
        jnp.zeros(shape, jnp.float32),
    )
    for side, visits in enumerate(block.visits):
        state = jax.lax.fori_loop(0, visits.num, functools.partial(visit, side), state)
    top, total, out = state
    if x.sink_logits is not None:
        sink = _spread(x.sink_logits.astype(jnp.float32), top)
        new = jnp.maximum(top, sink)
        shrink = jnp.exp(top - new)
        top, total, out = new, total * shrink + jnp.exp(sink - new), out * shrink[..., None]
    empty = total == 0
    total = jnp.where(empty, 1.0, total)
    lse = jnp.where(empty, HIDDEN, top + jnp.log(total))
    return (out / total[..., None]).astype(block.q[0].dtype), lse


def _spread(per_head: Float[Array, "n"], like: Float[Array, "P R"]) -> Float[Array, "P R"]:
    """Repeats each head's number over the rows of that head."""
    P, R = like.shape
    heads = per_head.reshape(P, -1, 1)
    return jnp.broadcast_to(heads, (*heads.shape[:2], R // heads.shape[1])).reshape(P, R)


def _forward(spec: AttentionSpec, tiling: Tiling, x: Arrays, layout: Layout) -> Any:
    def one_row(given: Any) -> tuple[Array, ...]:
        row = _open(tiling, x, layout, given)
        block = functools.partial(_forward_block, spec, row)
        out, lse = jax.lax.map(block, _query_blocks(row))
        return tuple(from_blocks(a, tiling.block_q) for a in (out, lse[..., None]))

    out, lse = (
        from_rows(a, tiling, x.q[0].shape[1]) for a in jax.lax.map(one_row, _rows(tiling, x))
    )
    return (out, lse[..., 0]), (x, layout, out, lse[..., 0])


class Known(NamedTuple):
    """What the backward pass knows of each query beforehand."""

    lse: Float[Array, "*I P R"]
    # d score = p · (d_out·v + rest), rest = d_lse - d_out·out.
    rest: Float[Array, "*I P R"]
    d_out: Float[Array, "*I P R H"]


class Sums(NamedTuple):
    """Gradients that all query blocks of a row add to; keys as [h, k], see `_backward_block`."""

    k: tuple[Float[Array, "J P H k"], ...]
    v: Float[Array, "J P H k"]
    head_parameters: Any


def _backward_block(
    spec: AttentionSpec, row: Row, sums: Sums, given: tuple[QueryBlock, Known]
) -> tuple[Sums, tuple[Array, ...]]:
    """Adds one query block's share to the sums; returns the gradients of its queries."""
    block, known = given
    x, sides = row.arrays, _sides(block)
    # With these flipped once, p and ds enter all products as they lie: no tile is transposed.
    q_flipped = tuple(a.swapaxes(1, 2) for a in block.q)
    d_out_flipped = known.d_out.swapaxes(1, 2)

    def visit(side: int, n: Array, state: Any) -> Any:
        dq, dk, dv, d_parameters = state
        j = _pick(block.visits[side].order, n)
        k, v, others = _pick((x.k[side], x.v, row.layout.k), j)
        scores = functools.partial(_scores, spec, block.tokens, others)
        s, back = jax.vjp(scores, x.head_parameters, _dot("prh,pkh->prk", block.q[side], k))
        p = jnp.exp(_hide(spec, block.tokens, others, sides[side], s) - known.lse[..., None])
        ds = p * (_dot("prh,pkh->prk", known.d_out, v) + known.rest[..., None])
        d_tile, ds = back(ds)
        dq = dq + _dot("prk,pkh->prh", ds, k)
        dk = _add(dk, j, _dot("phr,prk->phk", q_flipped[side], ds))
        dv = _add(dv, j, _dot("phr,prk->phk", d_out_flipped, p))
        return dq, dk, dv, jax.tree.map(jnp.add, d_parameters, d_tile)

    dqs, dks, dv, d_parameters = [], list(sums.k), sums.v, sums.head_parameters
    for side, visits in enumerate(block.visits):
        dq = jnp.zeros(block.q[0].shape, jnp.float32)
        dq, dks[side], dv, d_parameters = jax.lax.fori_loop(
            0,
            visits.num,
            functools.partial(visit, side),
            (dq, dks[side], dv, d_parameters),
        )
        dqs.append(dq.astype(block.q[0].dtype))
    return Sums(tuple(dks), dv, d_parameters), tuple(dqs)


def _backward(spec: AttentionSpec, tiling: Tiling, saved: Any, cotangents: Any) -> Any:
    x, layout, out, lse = saved
    d_out, d_lse = cotangents
    rest = d_lse - (d_out.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1)
    known = tuple(
        to_rows(a, tiling, tiling.block_q) for a in (lse[..., None], rest[..., None], d_out)
    )

    def one_row(d_parameters: Any, given: Any) -> Any:
        row = _open(tiling, x, layout, given[0])
        lse, rest, d_out = (to_blocks(a, tiling, tiling.block_q) for a in given[1])
        zeros = jnp.zeros(row.arrays.v.swapaxes(2, 3).shape, jnp.float32)
        own = jax.tree.map(jnp.zeros_like, row.arrays.head_parameters)
        sums, dq = jax.lax.scan(
            functools.partial(_backward_block, spec, row),
            Sums(tuple(zeros for _ in row.arrays.k), zeros, own),
            (_query_blocks(row), Known(lse[..., 0], rest[..., 0], d_out)),
        )
        d_parameters = jax.tree.map(
            lambda a, d: _add(a, row.group, d), d_parameters, sums.head_parameters
        )
        dq = tuple(from_blocks(a, tiling.block_q) for a in dq)
        dk, dv = jax.tree.map(
            lambda a: from_blocks(a.swapaxes(2, 3), tiling.block_k).astype(x.v.dtype),
            (sums.k, sums.v),
        )
        return d_parameters, (dq, dk, dv)

    start = jax.tree.map(jnp.zeros_like, _by_group(tiling, x.head_parameters))
    d_parameters, (dq, dk, dv) = jax.lax.scan(one_row, start, (_rows(tiling, x), known))
    grads = Arrays(
        tuple(from_rows(a, tiling, x.q[0].shape[1]) for a in dq),
        tuple(from_rows(a, tiling, x.v.shape[1]) for a in dk),
        from_rows(dv, tiling, x.v.shape[1]),
        jax.tree.map(lambda a, d: d.reshape(a.shape), x.head_parameters, d_parameters),
        _sink_gradient(x, lse, rest),
    )
    return grads, None


def _sink_gradient(x: Arrays, lse: Array, rest: Array) -> Array | None:
    """The sink has no value: its d score is its share of the softmax times the rest."""
    if x.sink_logits is None:
        return None
    share = jnp.exp(x.sink_logits.astype(jnp.float32)[None, None] - lse)
    return (share * rest).sum((0, 1)).astype(x.sink_logits.dtype)


_attend.defvjp(_forward, _backward)

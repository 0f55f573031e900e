"""Backward kernel of the sinks: what the queries of a block and its tile of sinks owe each other.

    grid (batch, kv head, query block, query head of its group)

As in backward.py, scores are transposed: [sinks, queries].
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels.flash_attention.backward import TN, Cotangents
from kernels.flash_attention.call import LANES, SUBLANES, Call, wide
from kernels.flash_attention.forward import NN, NT
from kernels.flash_attention.operands import Arrays, Far, Operands, rows_of
from kernels.flash_attention.sinks import block_number


def run(
    call: Call, x: Arrays, far: Far, d: Cotangents
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Gradients of far.q in its dtype, of far.k, far.v in float32, and of the bias, float32 [N]."""
    B, N, T, H = x.q.shape
    K, n = x.k.shape[1], call.blocks
    group, num_blocks, S, f32 = N // K, T // n.block_q, far.k.shape[3], jnp.float32

    def spec(block: tuple[Any, ...], index: Any) -> pl.BlockSpec:
        return pl.BlockSpec(block, lambda b, h, i, g, *_: index(b, h, i, h * group + g))

    queries = spec((None, None, n.block_q, H), lambda b, h, i, head: (b, head, i, 0))
    sinks = spec((None, None, None, S, H), lambda b, h, i, head: (b, h, i, 0, 0))
    row = spec((None, None, 1, n.block_q), lambda b, h, i, head: (b, head, 0, i))
    at = functools.partial(block_number, far.sinks)
    given = spec((None, None, None, S, H), lambda b, h, i, head: (b, h, at(i), 0, 0))
    per_sink = spec((None, None, S, LANES), lambda b, h, i, head: (b, at(i), 0, 0))
    operands = Operands(x.first_block)
    operands.add("q", far.q, queries)
    operands.add("k", far.k, given)
    operands.add("v", far.v, given)
    operands.add("d_out", d.out, queries)
    operands.add("lse", d.lse, row)
    operands.add("rest", d.rest, row)
    operands.add("slots", _columns(far.sinks.slots), per_sink)
    if x.segments is not None and far.sinks.segments is not None:
        ids = spec((None, SUBLANES, n.block_q), lambda b, h, i, head: (b, 0, i))
        operands.add("q_ids", rows_of(x.segments.q_ids), ids)
        owner = jnp.broadcast_to(far.sinks.segments[:, :, None], far.sinks.slots.shape)
        operands.add("k_ids", _columns(owner), per_sink)
    per_head = spec((None, 1, n.block_q), lambda b, h, i, head: (head, 0, 0))
    for name in ("bias", "factor"):
        if (of_heads := getattr(far, name)) is not None:
            operands.add(name, jnp.broadcast_to(of_heads[:, :, :1], (N, 1, n.block_q)), per_head)
    d_bias = spec((None, None, None, 1, n.block_q), lambda b, h, i, head: (b, head, i, 0, 0))
    outputs = {
        "dq": (queries, far.q.shape, far.q.dtype),
        "dk": (sinks, (B, K, num_blocks, S, H), f32),
        "dv": (sinks, (B, K, num_blocks, S, H), f32),
        "d_bias": (d_bias, (B, N, num_blocks, 1, n.block_q), f32),
    }
    dq, dk, dv, db = pl.pallas_call(
        functools.partial(kernel, call, (*operands.names, *outputs)),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=operands.num_prefetched,
            grid=(B, K, num_blocks, group),
            in_specs=operands.specs,
            out_specs=[spec for spec, *_ in outputs.values()],
        ),
        out_shape=[jax.ShapeDtypeStruct(*rest) for _, *rest in outputs.values()],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=n.vmem_bytes,
        ),
        cost_estimate=_cost(far),
        name="flash_attention_sinks_backward",
    )(*operands.arrays)
    return dq, dk, dv, db.sum((0, 2, 3, 4))


def _cost(far: Far) -> pl.CostEstimate:
    pairs = far.q.size // far.q.shape[3] * far.k.shape[3]
    return pl.CostEstimate(
        flops=10 * pairs * far.q.shape[3],
        transcendentals=pairs,
        bytes_accessed=3 * far.q.nbytes + 4 * far.k.nbytes,
    )


def _columns(x: jax.Array) -> jax.Array:
    """[B, I, S] → [B, I, S, LANES], equal lanes."""
    return jnp.broadcast_to(x[..., None], (*x.shape, LANES))


def kernel(call: Call, names: tuple[str, ...], *refs: Any) -> None:
    """Body of the grid step (batch, kv head, query block, query head g); i is the number of the
    block in the whole rows.
    """
    x = dict(zip(names, refs, strict=True))
    i, g = call.number(x, pl.program_id(2)), pl.program_id(3)
    n = call.blocks

    @pl.when(g == 0)
    def start() -> None:
        x["dk"][...] = jnp.zeros_like(x["dk"])
        x["dv"][...] = jnp.zeros_like(x["dv"])

    @pl.when(jnp.logical_not(call.has_sinks(i)))
    def nothing() -> None:
        x["dq"][...] = jnp.zeros_like(x["dq"])
        x["d_bias"][...] = jnp.zeros_like(x["d_bias"])

    @pl.when(call.has_sinks(i))
    def tiles() -> None:
        slots = wide(x["slots"][...], n.tile_q)
        for rows in range(0, n.block_q, n.tile_q):
            at = pl.ds(rows, n.tile_q)
            q_tile, d_out_tile = x["q"][at], x["d_out"][at]
            dots = call.dot(x["k"][...], q_tile, NT)
            s = capped = call.scores(dots)
            if "factor" in x:
                s = capped * x["factor"][:1, at]
            p = jnp.exp2(s + x["bias"][:1, at] - x["lse"][:1, at])
            seen = call.seen_sinks(i * n.block_q + rows, slots, axis=1)
            if "q_ids" in x:
                seen &= wide(x["k_ids"][...], n.tile_q) == x["q_ids"][:1, at]
            p = jnp.where(seen, p, 0.0)
            x["dv"][...] += call.dot(p.astype(q_tile.dtype), d_out_tile, NN)
            dp = call.dot(x["v"][...], d_out_tile, NT)
            ds = p * (dp + x["rest"][:1, at])
            x["d_bias"][:1, at] = ds.sum(0, keepdims=True)
            if "factor" in x:
                ds *= x["factor"][:1, at]
            ds = (call.before_cap(ds, capped) * call.scale).astype(q_tile.dtype)
            x["dk"][...] += call.dot(ds, q_tile, NN)
            x["dq"][at] = call.dot(ds, x["k"][...], TN).astype(q_tile.dtype)

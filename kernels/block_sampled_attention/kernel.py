"""The calls of the three kernels: which block is fetched at which grid step, and the gradients."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels.block_sampled_attention import backward, forward
from kernels.block_sampled_attention.call import Call
from kernels.flash_attention.call import HIDDEN, LANES, LOG2_E, SUBLANES
from kernels.flash_attention.operands import columns, query_ids, rows_of

FLOAT = jnp.float32


# The last axes of a grid add to one result.
BY_QUERIES = pltpu.CompilerParams(
    dimension_semantics=("parallel", "parallel", "parallel", "arbitrary")
)
BY_KEYS = pltpu.CompilerParams(
    dimension_semantics=("parallel", "parallel", "parallel", "arbitrary", "arbitrary")
)


def _query_specs(call: Call, head_dim: int, group: int) -> tuple[Any, Any, Any]:
    """Of a query block, of the key block whose turn it is, and of a query block's row.

    Grid (batch, head, query block, turn); prefetched scalars come after.
    """

    def key(b: Any, h: Any, i: Any, turn: Any, distances: Any, _: Any) -> Any:
        return b, h // group, call.key_block(i, turn, distances)[0], 0

    block = (None, None, call.block, head_dim)
    queries = pl.BlockSpec(block, lambda b, h, i, *_: (b, h, i, 0))
    row = pl.BlockSpec((None, None, 1, call.block), lambda b, h, i, *_: (b, h, 0, i))
    return queries, pl.BlockSpec(block, key), row


def _cost(call: Call, q: Any, k: Any, products: int) -> pl.CostEstimate:
    """As if every slot held a distance of mean length."""
    B, N, T, H = q.shape
    pairs = B * N * T * call.block * call.num_turns // 2
    blocks = 2 * B * N * call.num_blocks * call.num_turns * call.block * H * k.dtype.itemsize // 2
    return pl.CostEstimate(
        flops=2 * products * pairs * H, transcendentals=pairs, bytes_accessed=2 * q.nbytes + blocks
    )


def _ids(
    call: Call, segment_ids: Any, query_block: Any, key_block: Any, axis: int
) -> list[tuple[Any, pl.BlockSpec]]:
    """Segments of queries and of keys, as a tile meets them whose queries are along `axis`; none if
    there are none. `query_block` and `key_block`: grid position → (row of the batch, block).
    """
    if segment_ids is None:
        return []

    def across(at: Any) -> pl.BlockSpec:
        def index(*ids: Any) -> Any:
            b, block = at(*ids)
            return b, 0, block

        return pl.BlockSpec((None, SUBLANES, call.block), index)

    def down(at: Any) -> pl.BlockSpec:
        return pl.BlockSpec((None, call.block, LANES), lambda *ids: (*at(*ids), 0))

    own = query_ids(segment_ids)
    if axis == 0:
        return [(columns(own), down(query_block)), (rows_of(segment_ids), across(key_block))]
    return [(rows_of(own), across(query_block)), (columns(segment_ids), down(key_block))]


def _ids_by_queries(call: Call, segment_ids: Any, axis: int) -> list[tuple[Any, pl.BlockSpec]]:
    """Of the grid (batch, head, query block, turn)."""

    def key_block(b: Any, h: Any, i: Any, turn: Any, distances: Any, _: Any) -> Any:
        return b, call.key_block(i, turn, distances)[0]

    return _ids(call, segment_ids, lambda b, h, i, *_: (b, i), key_block, axis)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def attend(
    call: Call, q: Any, k: Any, v: Any, segment_ids: Any, sample: Any
) -> tuple[jax.Array, jax.Array]:
    """See `block_sampled_attention`; the length is whole blocks here."""
    return _forward(call, q, k, v, segment_ids, sample)[0]


def _forward(call: Call, q: Any, k: Any, v: Any, segment_ids: Any, sample: Any) -> Any:
    B, N, T, H = q.shape
    queries, keys, row = _query_specs(call, H, N // k.shape[1])
    ids = _ids_by_queries(call, segment_ids, axis=0)
    out, lse = pl.pallas_call(
        functools.partial(forward.kernel, call),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(B, N, call.num_blocks, call.num_turns),
            in_specs=[queries, keys, keys, *(spec for _, spec in ids)],
            out_specs=[queries, row],
            scratch_shapes=[
                pltpu.VMEM((call.block, LANES), FLOAT),
                pltpu.VMEM((call.block, LANES), FLOAT),
                pltpu.VMEM((call.block, H), FLOAT),
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct((B, N, 1, T), FLOAT),
        ],
        compiler_params=BY_QUERIES,
        cost_estimate=_cost(call, q, k, products=2),
        name="block_sampled_attention_forward",
    )(*sample, q, k, v, *(x for x, _ in ids))
    results = out, lse[:, :, 0]
    return results, (q, k, v, segment_ids, sample, *results)


def _backward(call: Call, saved: Any, cotangents: Any) -> Any:
    q, k, v, segment_ids, sample, out, lse = saved
    d_out, d_lse = cotangents
    rest = d_lse - (d_out.astype(FLOAT) * out.astype(FLOAT)).sum(-1)
    # A query that sees nothing has the log-sum-exp HIDDEN, which base 2 would make infinite.
    rows = jnp.where(lse == HIDDEN, 0.0, lse * LOG2_E)
    arrays = q, k, v, d_out.astype(q.dtype), rows[:, :, None], rest[:, :, None]
    B, N, _, H = q.shape
    queries, keys, row = _query_specs(call, H, N // k.shape[1])
    ids = _ids_by_queries(call, segment_ids, axis=1)
    dq = pl.pallas_call(
        functools.partial(backward.dq_kernel, call),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(B, N, call.num_blocks, call.num_turns),
            in_specs=[queries, keys, keys, queries, row, row, *(spec for _, spec in ids)],
            out_specs=queries,
            scratch_shapes=[pltpu.VMEM((call.block, H), FLOAT)],
        ),
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        compiler_params=BY_QUERIES,
        cost_estimate=_cost(call, q, k, products=3),
        name="block_sampled_attention_dq",
    )(*sample, *arrays, *(x for x, _ in ids))
    sinks = min(call.sink_blocks, call.num_blocks)
    parts = []
    if sinks:
        # Every later query sees them.
        every = jnp.arange(call.num_blocks, dtype=jnp.int32), jnp.zeros(call.num_blocks, FLOAT)
        parts.append(_keys_backward(call, every, arrays, segment_ids, 0, sinks))
    if sinks < call.num_blocks:
        parts.append(_keys_backward(call, sample, arrays, segment_ids, sinks, call.num_blocks))
    dk, dv = (jnp.concatenate(x, 2) for x in zip(*parts, strict=True))
    return dq, dk, dv, None, None


def _keys_backward(
    call: Call, sample: Any, arrays: Any, segment_ids: Any, first: int, end: int
) -> tuple[jax.Array, jax.Array]:
    """dk and dv of the key blocks [first, end), seen at the sample's distances."""
    q, k = arrays[:2]
    (B, N, _, H), K = q.shape, k.shape[1]
    group = N // K

    def query_block(i: Any, slot: Any, distances: Any) -> Any:
        return jnp.minimum(i + first + distances[slot], call.num_blocks - 1)

    block = (None, None, call.block, H)
    queries = pl.BlockSpec(
        block,
        lambda b, h, i, g, slot, d, _: (b, h * group + g, query_block(i, slot, d), 0),
    )
    row = pl.BlockSpec(
        (None, None, 1, call.block),
        lambda b, h, i, g, slot, d, _: (b, h * group + g, 0, query_block(i, slot, d)),
    )
    ids = _ids(
        call,
        segment_ids,
        lambda b, h, i, g, slot, d, _: (b, query_block(i, slot, d)),
        lambda b, h, i, *_: (b, i + first),
        axis=1,
    )
    keys = pl.BlockSpec(block, lambda b, h, i, *_: (b, h, i + first, 0))
    own = pl.BlockSpec(block, lambda b, h, i, *_: (b, h, i, 0))
    shape = jax.ShapeDtypeStruct((B, K, (end - first) * call.block, H), k.dtype)
    dk, dv = pl.pallas_call(
        functools.partial(backward.dkv_kernel, call, first),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(B, K, end - first, group, sample[0].shape[0]),
            in_specs=[queries, keys, keys, queries, row, row, *(spec for _, spec in ids)],
            out_specs=[own, own],
            scratch_shapes=[pltpu.VMEM((call.block, H), FLOAT)] * 2,
        ),
        out_shape=[shape, shape],
        compiler_params=BY_KEYS,
        cost_estimate=_cost(call, q, k, products=4),
        name="block_sampled_attention_dkv",
    )(*sample, *arrays, *(x for x, _ in ids))
    return dk, dv


attend.defvjp(_forward, _backward)

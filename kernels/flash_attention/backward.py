"""Backward kernel: dq, dk and dv in one pass over the tiles, five matrix products each.

    grid (batch, kv head, query head of its group, query block)

One stretch of keys and values stays in VMEM with the float32 sums of its gradients; query blocks
pass by. Scores are computed transposed, [keys, queries]: then the log-sum-exp and the rest term of
a query are rows, as they lie in memory, and of the five products only dq has to turn a tile.

    sᵀ = k·qᵀ      pᵀ = exp2(sᵀ - lse)     dv += pᵀ·do
    dpᵀ = v·doᵀ    dsᵀ = pᵀ(dpᵀ + rest)    dk += dsᵀ·q    dq += (dsᵀ)ᵀ·k

(Dao et al. 2022, arXiv 2205.14135, algorithm 4; rest = d_lse - Σ do·out.)
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels.flash_attention import bias
from kernels.flash_attention.call import LANES, SUBLANES, Call, wide
from kernels.flash_attention.forward import NN, NT
from kernels.flash_attention.operands import Arrays, Operands, columns, rows_of

TN = (((0,), (0,)), ((), ()))


class Cotangents(NamedTuple):
    """Of a forward pass.

    Attributes:
        out: [B, N, T, H].
        lse: float32 [B, N, 1, T], the log-sum-exp itself, in base 2.
        rest: float32 [B, N, 1, T]: d_lse - Σ d_out·out.
    """

    out: jax.Array
    lse: jax.Array
    rest: jax.Array


def run(call: Call, x: Arrays, d: Cotangents, learned_bias: bool) -> tuple[Any, Any, Any, Any]:
    """dq, dk, dv, in their arrays' dtypes, and the bias' gradient or None: sinks apart."""
    n, shape = call.blocks, x.k.shape
    grads = [_stretch(call, s, x, d, learned_bias) for s in range(call.num_stretches)]
    dq = grads[0][0]
    if len(grads) > 1:
        dq = jnp.zeros(x.q.shape, jnp.float32)
        for stretch, (part, *_) in enumerate(grads):
            first, end = _queries(call, stretch, x)
            dq = dq.at[:, :, first * n.block_q : end * n.block_q].add(part)
        dq = dq.astype(x.q.dtype)
    # What is left of the keys after the last stretch is padding.
    missing = shape[2] - call.num_stretches * n.stretch
    dk, dv = (
        jnp.pad(
            jnp.concatenate([part[side] for part in grads], 2),
            ((0, 0),) * 2 + ((0, missing), (0, 0)),
        )
        for side in (1, 2)
    )
    d_bias = sum(part[3].sum(0) for part in grads) if learned_bias else None
    return dq, dk, dv, d_bias


def _queries(call: Call, stretch: int, x: Arrays) -> tuple[int, int]:
    """First and one past the last of the call's query blocks that see keys of a stretch."""
    if x.first_block is not None:
        return 0, x.q.shape[2] // call.blocks.block_q  # any may
    per = call.blocks.blocks_per_stretch
    first, end = call.band.queries_of(stretch * per, (stretch + 1) * per)
    return (first if call.prefix is None else 0), end


def _spec(group: int, block: tuple[Any, ...], index: Any) -> pl.BlockSpec:
    """`index` of batch, kv head, query head and query block; scalars come after the program ids."""
    return pl.BlockSpec(block, lambda b, h, g, i, *_: index(b, h, h * group + g, i))


def _operands(call: Call, stretch: int, x: Arrays, d: Cotangents) -> Operands:
    _, N, _, H = x.q.shape
    n, (first, end) = call.blocks, _queries(call, stretch, x)
    spec = functools.partial(_spec, N // x.k.shape[1])
    queries = spec((None, None, n.block_q, H), lambda b, h, head, i: (b, head, i + first, 0))
    keys = spec((None, None, n.stretch, H), lambda b, h, head, i: (b, h, stretch, 0))
    row = spec((None, None, 1, n.block_q), lambda b, h, head, i: (b, head, 0, i + first))
    column = spec((None, n.stretch, LANES), lambda b, h, head, i: (b, stretch, 0))
    operands = Operands(x.first_block)
    operands.add("q", x.q, queries)
    operands.add("k", x.k, keys)
    operands.add("v", x.v, keys)
    operands.add("d_out", d.out, queries)
    operands.add("lse", d.lse, row)
    operands.add("rest", d.rest, row)
    if x.segments is not None:
        operands.prefetch("bounds", x.segments.bounds[:, first:end])
        ids = spec((None, SUBLANES, n.block_q), lambda b, h, head, i: (b, 0, i + first))
        operands.add("q_ids", rows_of(x.segments.q_ids), ids)
        operands.add("k_ids", columns(x.segments.k_ids), column)
    if x.is_open is not None:
        operands.add("open", columns(x.is_open), column)
    if x.bias is not None:
        along = bias.along_lanes(x.bias, call.reach, keys=False)
        whole = spec((None, *along.shape[1:]), lambda b, h, head, i: (head, 0, 0))
        operands.add("bias", along, whole)
    return operands


def _stretch(
    call: Call, stretch: int, x: Arrays, d: Cotangents, learned_bias: bool
) -> tuple[jax.Array, ...]:
    """dq of the queries that see one stretch of keys, that stretch's dk and dv, and what its pairs
    add to the bias' gradient, if that is asked for: float32 [B, N, 1, 2·reach].
    """
    B, N, _, H = x.q.shape
    K, n = x.k.shape[1], call.blocks
    first, end = _queries(call, stretch, x)
    spec = functools.partial(_spec, N // K)
    queries = spec((None, None, n.block_q, H), lambda b, h, head, i: (b, head, i, 0))
    own = spec((None, None, n.stretch, H), lambda b, h, head, i: (b, h, 0, 0))
    operands = _operands(call, stretch, x, d)
    f32, alone = jnp.float32, call.num_stretches == 1
    outputs = {
        "dq": (queries, (B, N, (end - first) * n.block_q, H), x.q.dtype if alone else f32),
        "dk": (own, (B, K, n.stretch, H), x.k.dtype),
        "dv": (own, (B, K, n.stretch, H), x.v.dtype),
    }
    if learned_bias:
        per_head = spec((None, None, 1, 2 * call.reach), lambda b, h, head, i: (b, head, 0, 0))
        outputs["d_bias"] = (per_head, (B, N, 1, 2 * call.reach), f32)
    names = (*operands.names, *outputs, "dq_sum", "dk_sum", "dv_sum")
    return pl.pallas_call(
        functools.partial(kernel, call, stretch, first, names),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=operands.num_prefetched,
            grid=(B, K, N // K, end - first),
            in_specs=operands.specs,
            out_specs=[spec for spec, *_ in outputs.values()],
            scratch_shapes=[
                pltpu.VMEM((n.block_q, H), f32),
                pltpu.VMEM((n.stretch, H), f32),
                pltpu.VMEM((n.stretch, H), f32),
            ],
        ),
        out_shape=[jax.ShapeDtypeStruct(*rest) for _, *rest in outputs.values()],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary"),
            vmem_limit_bytes=n.vmem_bytes,
        ),
        cost_estimate=call.cost(x.q, x.k, products=5, share=1 / call.num_stretches),
        name="flash_attention_backward",
    )(*operands.arrays)


def kernel(
    call: Call, stretch: int, first_query_block: int, names: tuple[str, ...], *refs: Any
) -> None:
    """Body of the grid step (batch b, kv head, query head g, query block i)."""
    x = dict(zip(names, refs, strict=True))
    q, k, v, d_out = (x[name] for name in ("q", "k", "v", "d_out"))
    dq_sum, dk_sum, dv_sum = (x[name] for name in ("dq_sum", "dk_sum", "dv_sum"))
    b, g, i = pl.program_id(0), pl.program_id(2), pl.program_id(3)
    last_g, last_i = pl.num_programs(2) - 1, pl.num_programs(3) - 1
    n, number = call.blocks, call.number(x, i + first_query_block)

    @pl.when((g == 0) & (i == 0))
    def start() -> None:
        dk_sum[...] = jnp.zeros_like(dk_sum)
        dv_sum[...] = jnp.zeros_like(dv_sum)

    dq_sum[...] = jnp.zeros_like(dq_sum)
    if "d_bias" in x:

        @pl.when(i == 0)
        def start_head() -> None:
            x["d_bias"][...] = jnp.zeros_like(x["d_bias"])

    def tile(rows: int, base: Any, offset: Any) -> None:
        """Gradients from query rows [rows, rows + tile_q) and `tile_k` keys from slot `base`."""
        at, keys = pl.ds(rows, n.tile_q), pl.ds(base, n.tile_k)
        f32 = {"preferred_element_type": jnp.float32}
        q_tile, k_tile, d_out_tile = q[at], k[keys], d_out[at]
        s = capped = call.scores(jax.lax.dot_general(k_tile, q_tile, NT, **f32))
        first = call.reach - call.offset(number, stretch, rows, base)
        if "bias" in x:
            s = capped + bias.tile(x["bias"], first, n.tile_k, n.tile_q, call.strides)
        same = None
        if "q_ids" in x:
            same = wide(x["k_ids"][keys], n.tile_q) == x["q_ids"][:1, at]
        is_open = wide(x["open"][keys], n.tile_q) != 0 if "open" in x else None
        seen = call.seen(offset, same, is_open, s.shape, axis=1)
        p = jnp.exp2(s - x["lse"][:1, at])
        if seen is not None:
            p = jnp.where(seen, p, 0.0)
        dv_sum[keys] += jax.lax.dot_general(p.astype(q.dtype), d_out_tile, NN, **f32)
        dp = jax.lax.dot_general(v[keys], d_out_tile, NT, **f32)
        ds = p * (dp + x["rest"][:1, at])
        if "d_bias" in x:
            bias.add_diagonals(x["d_bias"], first, ds)
        ds = call.before_cap(ds, capped).astype(q.dtype)
        dk_sum[keys] += jax.lax.dot_general(ds, q_tile, NN, **f32)
        dq_sum[at] += jax.lax.dot_general(ds, k_tile, TN, **f32)

    call.visit(number, stretch, call.bounds(x, b, i), tile)
    x["dq"][...] = (dq_sum[...] * call.scale).astype(
        q.dtype if call.num_stretches == 1 else jnp.float32
    )

    @pl.when((g == last_g) & (i == last_i))
    def finish() -> None:
        x["dk"][...] = (dk_sum[...] * call.scale).astype(k.dtype)
        x["dv"][...] = dv_sum[...].astype(v.dtype)

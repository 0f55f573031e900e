"""Forward kernel: one query block against all key blocks that the pattern shows it.

    grid (batch, head, query block, stretch of keys)

                 keys in VMEM, one stretch (here 6 blocks)
               ┌─────┬─────┬─────┬─────┬─────┬─────┐
    query      │whole│whole│whole│edge │     │     │   whole: a loop, no mask
    block i    │     │     │     │  ╲  │     │     │   edge:  unrolled, masked, its hidden
               └─────┴─────┴─────┴─────┴─────┴─────┘          corners left out

Within a block, tiles of `tile_q` × `tile_k` scores are unrolled, so that the compiler's scheduler
has matrix products of one tile to run beside the exponentials of another: that is where the speed
comes from. (Where it does not find them by itself, see `Blocks.early`.) So too the last steps of a
query block, and the reset for the next one, stand beside its last tiles, under no condition where
there need not be one. The running maximum is kept 128 lanes wide, which spares a relayout per tile,
and each lane keeps a sum of its own, which spares a reduction over lanes.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels.flash_attention import bias, fire_tiles, places
from kernels.flash_attention.call import (
    HIDDEN,
    LANES,
    LOG2_E,
    SUBLANES,
    Call,
    Tile,
    as_row,
    fold,
    wide,
)
from kernels.flash_attention.operands import Arrays, Operands, columns, rows_of
from kernels.flash_attention.sinks import as_rows, block_number

# jax 0.10 has it in pallas itself.
_reciprocal: Any = getattr(pltpu, "reciprocal", None) or pl.reciprocal


NN = (((1,), (0,)), ((), ()))
NT = (((1,), (1,)), ((), ()))


def run(call: Call, x: Arrays) -> tuple[jax.Array, jax.Array]:
    """Output [B, N, T, H] and log-sum-exp [B, N, T]."""
    B, N, T, H = x.q.shape
    n, operands = call.blocks, _operands(call, x)
    tiles = () if x.fire is None else ("quotient", "sum")
    names = (*operands.names, "out", "lse", "top", "total", "acc", *tiles)
    out, lse = pl.pallas_call(
        functools.partial(kernel, call, names),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=operands.num_prefetched,
            grid=(B, N, T // n.block_q, call.num_stretches),
            in_specs=operands.specs,
            out_specs=[
                _spec((None, None, n.block_q, H), lambda b, h, i, j: (b, h, i, 0)),
                _spec((None, None, 1, n.block_q), lambda b, h, i, j: (b, h, 0, i)),
            ],
            scratch_shapes=[
                pltpu.VMEM((n.block_q, LANES), jnp.float32),
                pltpu.VMEM((n.block_q, LANES), jnp.float32),
                pltpu.VMEM((n.block_q, H), jnp.float32),
                *[pltpu.VMEM((n.tile_q, n.tile_k), jnp.float32) for _ in tiles],
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct(x.q.shape, x.q.dtype),
            jax.ShapeDtypeStruct((B, N, 1, T), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary"),
            vmem_limit_bytes=n.vmem_bytes,
        ),
        cost_estimate=call.cost(x.q, x.k, products=2),
        name="flash_attention_forward",
    )(*operands.arrays)
    return out, lse[:, :, 0]


def _spec(block: tuple[Any, ...], index: Any) -> pl.BlockSpec:
    """Scalars that are prefetched come after the program ids; only keys' blocks need them."""
    return pl.BlockSpec(block, lambda b, h, i, j, *_: index(b, h, i, j))


def _whole(shape: tuple[int, ...]) -> pl.BlockSpec:
    return _spec(shape, lambda b, h, i, j: (0,) * len(shape))


def _operands(call: Call, x: Arrays) -> Operands:
    _, N, _, H = x.q.shape
    n, group = call.blocks, N // x.k.shape[1]
    operands = Operands(x.first_block)

    def stretch_of(b: Any, i: Any, j: Any, *scalars: Any) -> Any:
        """The stretch to fetch: a hidden one is never fetched, the nearest visible stays."""
        refs = dict(zip(operands.names, scalars, strict=False))
        if call.rule is not None:
            return jnp.clip(j, *places.stretches(call, refs, b, i))
        return jnp.clip(j, *call.stretches(call.number(refs, i)))

    queries = _spec((None, None, n.block_q, H), lambda b, h, i, j: (b, h, i, 0))
    keys = pl.BlockSpec(
        (None, None, n.stretch, H), lambda b, h, *ijs: (b, h // group, stretch_of(b, *ijs), 0)
    )
    row = pl.BlockSpec((None, SUBLANES, n.stretch), lambda b, h, *ijs: (b, 0, stretch_of(b, *ijs)))
    column = _spec((None, n.block_q, LANES), lambda b, h, i, j: (b, i, 0))
    operands.add("q", x.q, queries)
    operands.add("k", x.k, keys)
    operands.add("v", x.v, keys)
    if x.segments is not None:
        operands.prefetch_bounds(x.segments.bounds)
        operands.add("q_ids", columns(x.segments.q_ids), column)
        operands.add("k_ids", rows_of(x.segments.k_ids), row)
    if x.places is not None:
        operands.prefetch_places(x.places)
        operands.add("q_at", columns(x.places.q), column)
        operands.add("k_at", rows_of(x.places.k), row)
    if x.is_open is not None:
        operands.add("open", rows_of(x.is_open), row)
    for name in ("bias", "factor"):
        if (of_distance := getattr(x, name)) is not None:
            along = bias.along_lanes(of_distance, call.reach, keys=True)
            operands.add(name, along, _spec((None, *along.shape[1:]), lambda b, h, i, j: (h, 0, 0)))
    if x.fire is not None:
        fire_tiles.add_operands(operands, call, x.fire, keys=True, whole=_whole)
        operands.add("reciprocal", columns(x.fire.reciprocal), column)
    if x.far is not None:
        S = x.far.k.shape[3]
        at = functools.partial(block_number, x.far.sinks)
        block = _spec((None, None, None, S, H), lambda b, h, i, j: (b, h // group, at(i), 0, 0))
        row = _spec((None, None, SUBLANES, S), lambda b, h, i, j: (b, at(i), 0, 0))
        operands.add("q_far", x.far.q, queries)
        operands.add("k_sinks", x.far.k, block)
        operands.add("v_sinks", x.far.v, block)
        operands.add("sinks", as_rows(x.far.sinks), row)
        per_head = _spec((None, 1, S), lambda b, h, i, j: (h, 0, 0))
        operands.add("far_bias", x.far.bias, per_head)
        if x.far.factor is not None:
            operands.add("far_factor", x.far.factor, per_head)
    return operands


def kernel(call: Call, names: tuple[str, ...], *refs: Any) -> None:
    """Body of the grid step (batch b, head n, query block, stretch of keys j); i is the number of
    the block in the whole rows.
    """
    x = dict(zip(names, refs, strict=True))
    v, top, total, acc = (x[name] for name in ("v", "top", "total", "acc"))
    b, h, own, j = (pl.program_id(axis) for axis in range(4))
    n, i = call.blocks, call.number(x, own)

    def forget() -> None:
        top[...] = jnp.full_like(top, HIDDEN)
        total[...] = jnp.zeros_like(total)
        acc[...] = jnp.zeros_like(acc)

    # Of a head's first query block; the others find what `finish` leaves.
    pl.when((own == 0) & (j == 0))(forget)

    def add(at: Any, s: jax.Array, values: jax.Array) -> None:
        """Adds keys of scores s, in base 2, to query rows `at`."""
        old = top[at]
        new = jnp.maximum(old, s.max(1, keepdims=True))
        p, shrink = jnp.exp2(s - wide(new, s.shape[1])), jnp.exp2(old - new)
        value = call.dot(p.astype(v.dtype), values, NN)
        top[at] = new
        total[at] = total[at] * shrink + fold(p)
        acc[at] = acc[at] * wide(shrink, call.head_dim) + value

    def work(tiles: list[Tile]) -> None:
        """Adds `tile_k` keys to `tile_q` query rows, tile by tile."""
        begun: list[jax.Array] = []
        for number, (rows, base, _) in enumerate(tiles):
            while len(begun) < min(number + 1 + n.early, len(tiles)):
                begun.append(_scores(call, x, (b, h, i, j), *tiles[len(begun)]))
            add(pl.ds(rows, n.tile_q), begun[number], v[pl.ds(base, n.tile_k)])

    if "q_far" in x:

        @pl.when((j == 0) & call.has_sinks(i))
        def far() -> None:
            for rows in range(0, n.block_q, n.tile_q):
                add(pl.ds(rows, n.tile_q), _far_scores(call, x, i, rows), x["v_sinks"][...])

    if call.rule is None:
        call.visit(i, j, call.bounds(x, b, own), work)
    else:
        places.visit(call, x, b, own, j, work)

    @pl.when(call.num_stretches == 1 or j == call.num_stretches - 1)
    def finish() -> None:
        sums = total[...].sum(1, keepdims=True)
        factor = _reciprocal(jnp.where(sums == 0, 1.0, sums), full_range=False)
        x["out"][...] = (acc[...] * factor).astype(x["out"].dtype)
        sums, most = as_row(jnp.broadcast_to(sums, top.shape)), as_row(top[...])
        # exp2 throughout; the log-sum-exp is handed out in base e.
        lse = (most + jnp.log2(jnp.where(sums == 0, 1.0, sums))) / LOG2_E
        x["lse"][...] = jnp.where(sums == 0, HIDDEN, lse)
        forget()


def _scores(
    call: Call, x: dict[str, Any], step: tuple[Any, ...], rows: int, base: Any, offset: Any
) -> jax.Array:
    """Of one tile of a grid step: float32 [tile_q, tile_k] in base 2, -inf where hidden."""
    n, (b, h, i, j) = call.blocks, step
    size = (n.tile_q, n.tile_k, call.strides)
    at, keys = pl.ds(rows, n.tile_q), pl.ds(base, n.tile_k)
    s = call.scores(call.dot(x["q"][at], x["k"][keys], NT))
    before = call.offset(i, j, rows, base)
    first = call.reach + before
    if "factor" in x:
        s *= bias.tile(x["factor"], first, *size)
    if "bias" in x:
        s += bias.tile(x["bias"], first, *size)
    if "numerator" in x:
        quotients = bias.tile(x["numerator"], first, *size)
        quotients *= wide(x["reciprocal"][at], n.tile_k)
        s = fire_tiles.add(x, h, fire_tiles.span(call, x, b, i, rows, before), s, quotients)
    if "place_slopes" in x:
        s -= call.penalty(x, h, at, keys, axis=0)
    seen = _seen(call, x, at, keys, offset)
    return s if seen is None else jnp.where(seen, s, -jnp.inf)


def _seen(call: Call, x: dict[str, Any], at: Any, keys: Any, offset: Any) -> Any:
    """Which pairs of a tile, [queries, keys], are visible, or None for all."""
    if call.rule is not None:
        return call.seen_places(x, at, keys, offset, axis=0)
    n = call.blocks
    same = is_open = None
    if "q_ids" in x:
        same = wide(x["q_ids"][at], n.tile_k) == x["k_ids"][:1, keys]
    if "open" in x:
        is_open = x["open"][:1, keys] != 0
    return call.seen(offset, same, is_open, (n.tile_q, n.tile_k), axis=0)


def _far_scores(call: Call, x: dict[str, Any], i: Any, rows: int) -> jax.Array:
    """Of the sinks out of the window: float32 [tile_q, sinks] in base 2, -inf where hidden."""
    n = call.blocks
    at = pl.ds(rows, n.tile_q)
    dots = call.dot(x["q_far"][at], x["k_sinks"][...], NT)
    slots = jnp.broadcast_to(x["sinks"][:1], dots.shape)
    seen = call.seen_sinks(i * n.block_q + rows, slots, axis=0)
    if "q_ids" in x:
        seen &= wide(x["q_ids"][at], dots.shape[1]) == x["sinks"][1:2]
    s = call.scores(dots)
    if "far_factor" in x:
        s *= x["far_factor"][...]
    return jnp.where(seen, s + x["far_bias"][...], -jnp.inf)

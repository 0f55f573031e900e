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

from kernels.flash_attention import bias, fire_tiles, places
from kernels.flash_attention.broken_line import GROUP
from kernels.flash_attention.call import LANES, SUBLANES, Call, Tile, wide
from kernels.flash_attention.fire import Sums
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


class Gradients(NamedTuple):
    """All but what sinks add: of q, k and v in their arrays' dtypes.

    Attributes:
        bias: float32 [N, 1, 2·reach], or None.
        fire: or None.
    """

    q: jax.Array
    k: jax.Array
    v: jax.Array
    bias: Any
    fire: Sums | None


def run(call: Call, x: Arrays, d: Cotangents, learned_bias: bool) -> Gradients:
    """Of one call."""
    parts = [_stretch(call, s, x, d, learned_bias) for s in range(call.num_stretches)]
    # What is left of the keys after the last stretch is padding.
    missing = x.k.shape[2] - call.num_stretches * call.blocks.stretch
    dk, dv = (
        jnp.pad(
            jnp.concatenate([part[name] for part in parts], 2),
            ((0, 0),) * 2 + ((0, missing), (0, 0)),
        )
        for name in ("dk", "dv")
    )
    d_bias = sum(part["d_bias"].sum(0) for part in parts) if learned_bias else None
    fire = None
    if x.fire is not None:
        line, numerator = (sum(part[name] for part in parts) for name in ("d_line", "d_numerator"))
        rows = [part["d_reciprocal"].swapaxes(2, 3) for part in parts]
        fire = Sums(line, numerator, _of_queries(call, x, rows).swapaxes(2, 3))
    dq = _of_queries(call, x, [part["dq"] for part in parts])
    return Gradients(dq.astype(x.q.dtype), dk, dv, d_bias, fire)


def _of_queries(call: Call, x: Arrays, parts: list[jax.Array]) -> jax.Array:
    """The sum of what the stretches give their queries, [B, N, some queries, H]: of all queries."""
    if len(parts) == 1:
        return parts[0]
    B, N, _, H = parts[0].shape
    total = jnp.zeros((B, N, x.q.shape[2], H), jnp.float32)
    for stretch, part in enumerate(parts):
        first, end = _queries(call, stretch, x)
        block_q = call.blocks.block_q
        total = total.at[:, :, first * block_q : end * block_q].add(part)
    return total


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
    n, (first, _) = call.blocks, _queries(call, stretch, x)
    spec = functools.partial(_spec, N // x.k.shape[1])
    queries = spec((None, None, n.block_q, H), lambda b, h, head, i: (b, head, i + first, 0))
    keys = spec((None, None, n.stretch, H), lambda b, h, head, i: (b, h, stretch, 0))
    row = spec((None, None, 1, n.block_q), lambda b, h, head, i: (b, head, 0, i + first))
    column = spec((None, n.stretch, LANES), lambda b, h, head, i: (b, stretch, 0))
    of_queries = spec((None, SUBLANES, n.block_q), lambda b, h, head, i: (b, 0, i + first))
    operands = Operands(x.first_block)
    operands.add("q", x.q, queries)
    operands.add("k", x.k, keys)
    operands.add("v", x.v, keys)
    operands.add("d_out", d.out, queries)
    operands.add("lse", d.lse, row)
    operands.add("rest", d.rest, row)
    if x.segments is not None:
        operands.prefetch_bounds(x.segments.bounds)
        operands.add("q_ids", rows_of(x.segments.q_ids), of_queries)
        operands.add("k_ids", columns(x.segments.k_ids), column)
    if x.places is not None:
        operands.prefetch_places(x.places)
        operands.add("q_at", rows_of(x.places.q), of_queries)
        operands.add("k_at", columns(x.places.k), column)
    if x.is_open is not None:
        operands.add("open", columns(x.is_open), column)
    for name in ("bias", "factor"):
        if (of_distance := getattr(x, name)) is not None:
            along = bias.along_lanes(of_distance, call.reach, keys=False)
            whole = spec((None, *along.shape[1:]), lambda b, h, head, i: (head, 0, 0))
            operands.add(name, along, whole)
    if x.fire is not None:
        fire_tiles.add_operands(
            operands,
            call,
            x.fire,
            keys=False,
            whole=lambda shape: spec(shape, lambda b, h, head, i: (0,) * len(shape)),
        )
        operands.add("reciprocal", rows_of(x.fire.reciprocal), of_queries)
    return operands


def _stretch(
    call: Call, stretch: int, x: Arrays, d: Cotangents, learned_bias: bool
) -> dict[str, jax.Array]:
    """dq of the queries that see one stretch of keys, that stretch's dk and dv, and what its pairs
    add to the bias' gradient, if that is asked for: float32 [B, N, 1, 2·reach], and to FIRE's sums.
    """
    B, N, _, H = x.q.shape
    K, n = x.k.shape[1], call.blocks
    first, end = _queries(call, stretch, x)
    spec = functools.partial(_spec, N // K)
    queries = spec((None, None, n.block_q, H), lambda b, h, head, i: (b, head, i, 0))
    own = spec((None, None, n.stretch, H), lambda b, h, head, i: (b, h, 0, 0))
    operands = _operands(call, stretch, x, d)
    f32, alone = jnp.float32, call.num_stretches == 1
    outputs: dict[str, Any] = {
        "dq": (queries, (B, N, (end - first) * n.block_q, H), x.q.dtype if alone else f32),
        "dk": (own, (B, K, n.stretch, H), x.k.dtype),
        "dv": (own, (B, K, n.stretch, H), x.v.dtype),
    }
    if learned_bias:
        per_head = spec((None, None, 1, 2 * call.reach), lambda b, h, head, i: (b, head, 0, 0))
        outputs["d_bias"] = (per_head, (B, N, 1, 2 * call.reach), f32)
    tiles: tuple[str, ...] = ()
    if x.fire is not None:
        kinks = x.fire.line.kinks.size + GROUP - 1
        shapes = {"d_line": (2, kinks, LANES), "d_numerator": (1, 2 * call.reach)}
        for name, shape in shapes.items():
            zeros = (0,) * len(shape)
            whole = spec((None, None, *shape), lambda b, h, head, i, at=zeros: (b, head, *at))
            outputs[name] = (whole, (B, N, *shape), f32)
        row = spec((None, None, 1, n.block_q), lambda b, h, head, i: (b, head, 0, i))
        outputs["d_reciprocal"] = (row, (B, N, 1, (end - first) * n.block_q), f32)
        tiles = ("quotient", "sum", "rise")
    names = (*operands.names, *outputs, "dq_sum", "dk_sum", "dv_sum", *tiles)
    results = pl.pallas_call(
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
                *[pltpu.VMEM((n.tile_k, n.tile_q), f32) for _ in tiles],
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
    return dict(zip(outputs, results, strict=True))


def kernel(
    call: Call, stretch: int, first_query_block: int, names: tuple[str, ...], *refs: Any
) -> None:
    """Body of the grid step (batch b, kv head, query head g, query block i)."""
    x = dict(zip(names, refs, strict=True))
    b, g, i = pl.program_id(0), pl.program_id(2), pl.program_id(3)
    last_g, last_i = pl.num_programs(2) - 1, pl.num_programs(3) - 1
    number = call.number(x, i + first_query_block)
    step = b, pl.program_id(1) * pl.num_programs(2) + g, number, stretch

    @pl.when((g == 0) & (i == 0))
    def start() -> None:
        _clear(x, "dk_sum", "dv_sum")

    _clear(x, "dq_sum", "d_reciprocal")
    if "d_bias" in x or "d_line" in x:

        @pl.when(i == 0)
        def start_head() -> None:
            _clear(x, "d_bias", "d_line", "d_numerator")

    def work(tiles: list[Tile]) -> None:
        for at in tiles:
            _tile(call, x, step, *at)

    if call.rule is None:
        call.visit(number, stretch, call.bounds(x, b, i + first_query_block), work)
    else:
        places.visit(call, x, b, i, stretch, work)
    x["dq"][...] = (x["dq_sum"][...] * call.scale).astype(x["dq"].dtype)

    @pl.when((g == last_g) & (i == last_i))
    def finish() -> None:
        x["dk"][...] = (x["dk_sum"][...] * call.scale).astype(x["dk"].dtype)
        x["dv"][...] = x["dv_sum"][...].astype(x["dv"].dtype)


def _tile(
    call: Call, x: dict[str, Any], step: tuple[Any, ...], rows: int, base: Any, offset: Any
) -> None:
    """Gradients from query rows [rows, rows + tile_q) and `tile_k` keys from slot `base`; `step` is
    (batch, query head, query block, stretch).
    """
    q, k, v, d_out = (x[name] for name in ("q", "k", "v", "d_out"))
    n, (b, head, i, stretch) = call.blocks, step
    at, keys = pl.ds(rows, n.tile_q), pl.ds(base, n.tile_k)
    q_tile, k_tile, d_out_tile = q[at], k[keys], d_out[at]
    capped = call.scores(call.dot(k_tile, q_tile, NT))
    before = call.offset(i, stretch, rows, base)
    first = call.reach - before
    s, factor = _changed(call, x, capped, first)
    if "place_slopes" in x:
        s -= call.penalty(x, head, at, keys, axis=1)
    if "numerator" in x:
        reciprocal = x["reciprocal"][:1, at]
        size = (n.tile_k, n.tile_q, call.strides)
        quotients = bias.tile(x["numerator"], first, *size) * reciprocal
        span = fire_tiles.span(call, x, b, i, rows, before)
        s = fire_tiles.add(x, head, span, s, quotients)
    seen = _seen(call, x, at, keys, offset)
    p = jnp.exp2(s - x["lse"][:1, at])
    if seen is not None:
        p = jnp.where(seen, p, 0.0)
    x["dv_sum"][keys] += call.dot(p.astype(q.dtype), d_out_tile, NN)
    dp = call.dot(v[keys], d_out_tile, NT)
    ds = p * (dp + x["rest"][:1, at])
    if "d_bias" in x:
        bias.add_diagonals(x["d_bias"], first, ds)
    if "numerator" in x:
        d_quotients = fire_tiles.add_gradients(x, head, span, ds)
        bias.add_diagonals(x["d_numerator"], first, d_quotients * reciprocal)
        x["d_reciprocal"][:1, at] += (d_quotients * x["quotient"][...]).sum(0, keepdims=True)
    ds = ds if factor is None else ds * factor
    ds = call.before_cap(ds, capped).astype(q.dtype)
    x["dk_sum"][keys] += call.dot(ds, q_tile, NN)
    x["dq_sum"][at] += call.dot(ds, k_tile, TN)


def _clear(x: dict[str, Any], *names: str) -> None:
    """Sets to 0 those of the names that there are."""
    for ref in (x[name] for name in names if name in x):
        ref[...] = jnp.zeros_like(ref)


def _changed(
    call: Call, x: dict[str, Any], capped: jax.Array, first: Any
) -> tuple[jax.Array, jax.Array | None]:
    """A tile's scores with what depends on the distance, and the factor among it; see `bias.tile`
    for `first`.
    """
    s, factor, size = capped, None, (call.blocks.tile_k, call.blocks.tile_q)
    if "factor" in x:
        factor = bias.tile(x["factor"], first, *size, call.strides)
        s = s * factor
    if "bias" in x:
        s = s + bias.tile(x["bias"], first, *size, call.strides)
    return s, factor


def _seen(call: Call, x: dict[str, Any], at: Any, keys: Any, offset: Any) -> Any:
    """Which pairs of a tile, [keys, queries], are visible, or None for all."""
    if call.rule is not None:
        return call.seen_places(x, at, keys, offset, axis=1)
    n = call.blocks
    same = is_open = None
    if "q_ids" in x:
        same = wide(x["k_ids"][keys], n.tile_q) == x["q_ids"][:1, at]
    if "open" in x:
        is_open = wide(x["open"][keys], n.tile_q) != 0
    return call.seen(offset, same, is_open, (n.tile_k, n.tile_q), axis=1)

"""The calls of the two kernels: what lies in VMEM at which grid step, and the gradient rule."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels.flash_attention import backward, forward
from kernels.flash_attention.blocks import Blocks
from kernels.flash_attention.call import HIDDEN, LANES, LOG2_E, SUBLANES, Call
from kernels.flash_attention.pattern import Band
from kernels.flash_attention.segments import block_bounds


@dataclasses.dataclass(frozen=True)
class Settings:
    """The static half of a call: hashable.

    Attributes:
        ahead: keys after the query that it sees, 0 is causal; None: all.
        window: keys up to the query that it sees, its own included; None: all.
        scale: multiplies q·k.
        softcap: scores become softcap·tanh(scores / softcap); None: they don't.
        blocks: sizes of the forward and of the backward kernel.
    """

    ahead: int | None
    window: int | None
    scale: float
    softcap: float | None
    blocks: tuple[Blocks, Blocks]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def attend(settings: Settings, q: Any, k: Any, v: Any, segment_ids: Any) -> Any:
    """See `flash_attention`; lengths are whole blocks and stretches here."""
    return _forward(settings, q, k, v, segment_ids)[0]


def _call(settings: Settings, blocks: Blocks, q: jax.Array, segment_ids: Any) -> Call:
    T, H = q.shape[2:]
    s = settings
    band = Band(
        s.ahead, s.window, blocks.block_q, blocks.block_k, T // blocks.block_q, T // blocks.block_k
    )
    return Call(band, blocks, H, s.scale, s.softcap, segment_ids is not None)


def _columns(ids: jax.Array) -> jax.Array:
    """[B, T] → [B, T, LANES], equal lanes."""
    return jnp.broadcast_to(ids[:, :, None], (*ids.shape, LANES))


def _rows(ids: jax.Array) -> jax.Array:
    """[B, T] → [B, SUBLANES, T], equal rows."""
    return jnp.broadcast_to(ids[:, None], (ids.shape[0], SUBLANES, ids.shape[1]))


def _query_ids(ids: jax.Array) -> jax.Array:
    """Padding as a query is of no key's segment, not of that of padding keys either."""
    return jnp.where(ids == 0, -1, ids)


def _forward(settings: Settings, q: Any, k: Any, v: Any, segment_ids: Any) -> Any:
    B, N, T, H = q.shape
    n = settings.blocks[0]
    call = _call(settings, n, q, segment_ids)
    group = N // k.shape[1]

    def stretch_of(i: Any, j: Any) -> Any:
        """The stretch to fetch: a hidden one is never fetched, the nearest visible stays."""
        first, last = call.band.visible_blocks(i)
        return jnp.clip(j, first // n.blocks_per_stretch, last // n.blocks_per_stretch)

    def spec(block: tuple[Any, ...], index: Any) -> pl.BlockSpec:
        # Scalars that are prefetched come after the program ids.
        return pl.BlockSpec(block, lambda b, h, i, j, *_: index(b, h, i, j))

    q_spec = spec((None, None, n.block_q, H), lambda b, h, i, j: (b, h, i, 0))
    kv_spec = spec(
        (None, None, n.stretch, H), lambda b, h, i, j: (b, h // group, stretch_of(i, j), 0)
    )
    lse_spec = spec((None, None, 1, n.block_q), lambda b, h, i, j: (b, h, 0, i))
    in_specs, arguments, prefetched = [q_spec, kv_spec, kv_spec], [q, k, v], []
    if segment_ids is not None:
        own = segment_ids[:, :T]  # what is after it is padding
        prefetched = [block_bounds(own, n.block_q, n.block_k)]
        arguments += [_columns(_query_ids(own)), _rows(segment_ids)]
        in_specs += [
            spec((None, n.block_q, LANES), lambda b, h, i, j: (b, i, 0)),
            spec((None, SUBLANES, n.stretch), lambda b, h, i, j: (b, 0, stretch_of(i, j))),
        ]
    out, lse = pl.pallas_call(
        functools.partial(forward.kernel, call),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(prefetched),
            grid=(B, N, call.band.num_blocks_q, call.num_stretches),
            in_specs=in_specs,
            out_specs=[q_spec, lse_spec],
            scratch_shapes=[
                pltpu.VMEM((n.block_q, LANES), jnp.float32),
                pltpu.VMEM((n.block_q, LANES), jnp.float32),
                pltpu.VMEM((n.block_q, H), jnp.float32),
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct((B, N, 1, T), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary"),
            vmem_limit_bytes=n.vmem_bytes,
        ),
        cost_estimate=_cost(call, q, k, products=2),
        name="flash_attention_forward",
    )(*prefetched, *arguments)
    out = (out, lse[:, :, 0])
    return out, (q, k, v, segment_ids, *out)


def _backward(settings: Settings, saved: Any, cotangents: Any) -> Any:
    q, k, v, segment_ids, out, lse = saved
    d_out, d_lse = cotangents
    n = settings.blocks[1]
    call = _call(settings, n, q, segment_ids)
    rest = d_lse - (d_out.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1)
    # A query that sees nothing has the log-sum-exp HIDDEN, which base 2 would make infinite.
    rows = jnp.where(lse == HIDDEN, 0.0, lse * LOG2_E)[:, :, None], rest[:, :, None]
    d_out = d_out.astype(q.dtype)
    arrays = q, k, v, d_out, *rows
    grads = [
        _backward_stretch(call, stretch, arrays, segment_ids)
        for stretch in range(call.num_stretches)
    ]
    dq = grads[0][0]
    if len(grads) > 1:
        dq = jnp.zeros(q.shape, jnp.float32)
        for stretch, (part, _, _) in enumerate(grads):
            first, end = _queries(call, stretch)
            dq = dq.at[:, :, first * n.block_q : end * n.block_q].add(part)
        dq = dq.astype(q.dtype)
    dk, dv = (_joined([part[side] for part in grads], k.shape[2]) for side in (1, 2))
    return dq, dk, dv, None


def _joined(parts: list[jax.Array], length: int) -> jax.Array:
    """The stretches' gradients one after the other; what is left of the keys is padding."""
    whole = jnp.concatenate(parts, 2)
    return jnp.pad(whole, ((0, 0), (0, 0), (0, length - whole.shape[2]), (0, 0)))


def _queries(call: Call, stretch: int) -> tuple[int, int]:
    """First and one past the last query block that sees keys of a stretch."""
    per = call.blocks.blocks_per_stretch
    return call.band.queries_of(stretch * per, (stretch + 1) * per)


def _backward_stretch(
    call: Call, stretch: int, arrays: Any, segment_ids: Any
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """dq of the queries that see one stretch of keys, and that stretch's dk and dv."""
    q, k = arrays[:2]
    B, N, _, H = q.shape
    K, n = k.shape[1], call.blocks
    group = N // K
    first, end = _queries(call, stretch)

    def spec(block: tuple[Any, ...], index: Any) -> pl.BlockSpec:
        return pl.BlockSpec(block, lambda b, h, g, i, *_: index(b, h, h * group + g, i))

    def queries(offset: int) -> pl.BlockSpec:
        return spec((None, None, n.block_q, H), lambda b, h, head, i: (b, head, i + offset, 0))

    keys = spec((None, None, n.stretch, H), lambda b, h, head, i: (b, h, stretch, 0))
    own = spec((None, None, n.stretch, H), lambda b, h, head, i: (b, h, 0, 0))
    row = spec((None, None, 1, n.block_q), lambda b, h, head, i: (b, head, 0, i + first))
    in_specs, arguments = [queries(first), keys, keys, queries(first), row, row], list(arrays)
    prefetched = []
    if segment_ids is not None:
        own_ids = segment_ids[:, : q.shape[2]]
        bounds = block_bounds(own_ids, n.block_q, n.block_k)
        prefetched = [bounds[:, first:end]]
        arguments += [_rows(_query_ids(own_ids)), _columns(segment_ids)]
        in_specs += [
            spec((None, SUBLANES, n.block_q), lambda b, h, head, i: (b, 0, i + first)),
            spec((None, n.stretch, LANES), lambda b, h, head, i: (b, stretch, 0)),
        ]
    whole = call.num_stretches == 1
    dq_shape = (B, N, (end - first) * n.block_q, H)
    return pl.pallas_call(
        functools.partial(backward.kernel, call, stretch, first),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(prefetched),
            grid=(B, K, group, end - first),
            in_specs=in_specs,
            out_specs=[queries(0), own, own],
            scratch_shapes=[
                pltpu.VMEM((n.block_q, H), jnp.float32),
                pltpu.VMEM((n.stretch, H), jnp.float32),
                pltpu.VMEM((n.stretch, H), jnp.float32),
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct(dq_shape, q.dtype if whole else jnp.float32),
            jax.ShapeDtypeStruct((B, K, n.stretch, H), k.dtype),
            jax.ShapeDtypeStruct((B, K, n.stretch, H), k.dtype),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary"),
            vmem_limit_bytes=n.vmem_bytes,
        ),
        cost_estimate=_cost(call, q, k, products=5, share=1 / call.num_stretches),
        name="flash_attention_backward",
    )(*prefetched, *arguments)


def _cost(
    call: Call, q: jax.Array, k: jax.Array, products: int, share: float = 1
) -> pl.CostEstimate:
    """Of the visible pairs: products, exponentials, and every array once."""
    B, N, T, H = q.shape
    pairs = B * N * call.band.num_pairs(T) * share
    arrays = 2 * (q.nbytes + k.nbytes) * (1 if products == 2 else 2) * share
    return pl.CostEstimate(
        flops=int(2 * products * pairs * H), transcendentals=int(pairs), bytes_accessed=int(arrays)
    )


attend.defvjp(_forward, _backward)

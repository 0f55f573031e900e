"""The decode kernel for zones of several precisions behind the door of cached attention."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxlm.attention import decode
from jaxlm.attention.averaged import AveragedLayer
from jaxlm.attention.inputs import AttentionInputs, AttentionSpec, CachedLayer
from jaxlm.attention.on_mesh import on_mesh
from jaxlm.attention.quantized_layer import QuantizedLayer
from jaxlm.attention.reference import attend_reference, with_position
from kernels.chip import target_chip
from kernels.decode_attention import Queries, Scoring, Slots, bias_fits, merge
from kernels.quantized_decode_attention import Zone, quantized_decode_attention


def unsupported(
    spec: AttentionSpec,
    new: AttentionInputs,
    full: CachedLayer,
    zones: tuple[QuantizedLayer, ...],
) -> str | None:
    """What of a call the kernel does not do; None: it does it all."""
    if (missing := decode.unsupported(spec, new, full)) is not None:
        return missing
    (B, T, N, H), S = new.q.shape, 0
    if H not in (64, 128, 256):
        return f"head_dim={H}"
    if new.q_far is not None:
        return "keys that are met in another rotation at the distance ceiling"
    for zone in zones:
        S = zone.positions.shape[1]
        slot = (zone.keys.nbytes + zone.values.nbytes) // (zone.keys.codes.shape[0] * B * S)
        if spec.score is not None and not bias_fits(N, T, slot):
            return f"a bias of {T} tokens of {N} heads, which is larger than the cache"
    return None


def attend_zones(
    spec: AttentionSpec,
    new: AttentionInputs,
    full: CachedLayer,
    zones: tuple[QuantizedLayer, ...],
    averaged: tuple[AveragedLayer, ...] = (),
) -> Float[Array, "B T N H"]:
    """`ZonedLayer.attend` by `kernels.quantized_decode_attention`, for what it does.

    On a mesh set by `jax.set_mesh`, each device attends for its rows and its heads.
    """
    pattern = decode.window_and_sinks(spec.mask)
    assert pattern is not None
    scoring = Scoring(spec.scale, spec.softcap, *pattern)
    layers: list[CachedLayer | QuantizedLayer] = [full, *zones]
    parts = [(x.keys, x.values, x.positions, x.segment_ids) for x in layers]
    arrays, structure = jax.tree.flatten(parts)
    heads, row = ("batch", "kv_heads"), ("batch",)
    cache = (None, *heads)
    run = on_mesh(
        functools.partial(_attend, spec, scoring, structure),
        {"batch": new.q.shape[0], "kv_heads": new.k.shape[2]},
        [heads, row, row, ("kv_heads",), (), *(cache if x.ndim > 2 else row for x in arrays)],
        [heads, heads],
    )
    out, lse = run(
        *(new.q.swapaxes(1, 2), new.q_positions, new.q_segment_ids, new.head_parameters),
        *(full.layer, *arrays),
    )
    cached = out.swapaxes(1, 2), lse.swapaxes(1, 2)
    others = [zone.alone(spec, new) for zone in averaged]
    return merge([cached, *others, attend_reference(spec, new)])[0]


def _attend(
    spec: AttentionSpec,
    scoring: Scoring,
    structure: Any,
    q: Float[Array, "B N T H"],
    q_positions: Int[Array, "B T"],
    q_segment_ids: Int[Array, "B T"],
    head_parameters: Any,
    layer: Int[Array, ""],
    *arrays: Array,
) -> tuple[Float[Array, "B N T H"], Float[Array, "B N T"]]:
    """One device's rows and heads, of one layer of [layers, B, K, …]."""
    zones, B = [], q.shape[0]
    for *kept, positions, segment_ids in jax.tree.unflatten(structure, arrays):
        keys, values = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), kept)
        S, bias = positions.shape[1], None
        if spec.score is not None:
            zeros = jnp.zeros((*q.shape[:3], S), jnp.float32)
            bias = with_position(spec, head_parameters, zeros, q_positions, positions)
        # What lies behind the last token is not fetched.
        lengths = jnp.where(segment_ids != 0, jnp.arange(1, S + 1)[None], 0).max(1)
        zones.append(Zone(keys, values, Slots(positions, segment_ids, lengths, bias)))
    queries = Queries(q_positions, q_segment_ids)
    rows = layer * B + jnp.arange(B)
    return quantized_decode_attention(q, zones, scoring, queries, k_rows=rows, chip=target_chip())

"""The decode kernel behind the door of cached attention."""

from __future__ import annotations

import functools
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxlm.attention.far_sinks import attend_far_sinks
from jaxlm.attention.inputs import AttentionInputs, AttentionSpec, CachedLayer
from jaxlm.attention.layer_view import FarKeys
from jaxlm.attention.mask import AttentionMask, Interval
from jaxlm.attention.on_mesh import on_mesh
from jaxlm.attention.reference import attend_reference, with_position
from kernels.chip import target_chip
from kernels.decode_attention import (
    MOST_TOKENS,
    Queries,
    Scoring,
    Slots,
    bias_fits,
    decode_attention,
    merge,
    paged_decode_attention,
    table_fits,
)


def unsupported(spec: AttentionSpec, new: AttentionInputs, cached: CachedLayer) -> str | None:
    """What of a call the kernel does not do; None: it does it all."""
    if target_chip() is None:
        return "a device that is no TPU"
    T, N, H = new.q.shape[1:]
    if T > MOST_TOKENS:
        return f"{T} tokens at once: that is prefill"
    if H % 8 or H > 256:
        return f"head_dim={H}"
    if new.q.dtype not in (jnp.bfloat16, jnp.float32):
        return f"dtype={new.q.dtype}"
    if cached.pages is not None and not table_fits(*cached.pages.shape):
        return f"a table of {cached.pages.shape} pages, which is larger than scalar memory"
    pattern = window_and_sinks(spec.mask)
    if pattern is None:
        return f"mask={spec.mask}"
    if spec.score is not None:
        K = cached.keys.shape[2]
        if spec.score_form not in ("bias", "slope", "network"):
            return "a position encoding whose change to a score is no bias"
        if not bias_fits(N, T, 2 * K * H * cached.keys.dtype.itemsize):
            return f"a bias of {T} tokens of {N} heads, which is larger than the cache"
    return None if new.q_far is None else _unmet_ceiling(spec, T, cached, *pattern)


def _unmet_ceiling(
    spec: AttentionSpec, T: int, cached: CachedLayer, window: int | None, num_sinks: int
) -> str | None:
    """The kernel meets all keys alike: at the ceiling may be no more than a few sinks."""
    if window is None or spec.ceiling is None or spec.ceiling < window:
        return f"ceiling={spec.ceiling} with window={window}"
    if T * num_sinks > cached.positions.shape[1]:
        return f"{num_sinks} sinks of {T} tokens, which are more than the cache"
    return None


def window_and_sinks(mask: AttentionMask) -> tuple[int | None, int] | None:
    """(window or None, kept sinks) of a causal, sliding or Λ-shaped mask; None: another one."""
    near, *rest = mask.intervals
    if near != Interval(window=near.window) or len(rest) > 1:
        return None
    if not rest:
        return near.window, 0
    num_sinks = rest[0].below
    if near.window is None or num_sinks is None:
        return None
    if rest[0] == Interval(window=near.window, below=num_sinks):
        return near.window, 0  # no sink is out of the window
    return (near.window, num_sinks) if rest[0] == Interval(below=num_sinks) else None


def attend_decode(
    spec: AttentionSpec,
    new: AttentionInputs,
    cached: CachedLayer,
    far_keys: FarKeys | None = None,
) -> Float[Array, "B T N H"]:
    """`SlotLayer.attend` by the kernel of `kernels.decode_attention`, for what it does.

    On a mesh set by `jax.set_mesh`, each device attends for its rows and its heads; of a pool of
    pages it has its heads of all pages, since any row may hold any of them.
    """
    pattern = window_and_sinks(spec.mask)
    assert pattern is not None
    window, num_sinks = pattern
    parts = [attend_reference(spec, new)]  # a learned sink logit is in this part
    if new.q_far is not None and num_sinks:
        assert window is not None
        assert far_keys is not None
        parts.append(attend_far_sinks(spec, new, cached, window, num_sinks, far_keys))
        num_sinks = 0
    scoring = Scoring(spec.scale, spec.softcap, window, num_sinks)
    array, row = ("batch", "kv_heads"), ("batch",)
    cache = (None, *array) if cached.pages is None else (None, None, "kv_heads")
    run = on_mesh(
        functools.partial(_attend_layer, spec, scoring),
        {"batch": cached.positions.shape[0], "kv_heads": cached.keys.shape[2]},
        [array, cache, cache, (), row, row, row, row, row, ("kv_heads",)],
        [array, array],
    )
    out, lse = run(
        *(new.q.swapaxes(1, 2), cached.keys, cached.values, cached.layer, cached.pages),
        *(new.q_positions, cached.positions, new.q_segment_ids, cached.segment_ids),
        new.head_parameters,
    )
    return merge([(out.swapaxes(1, 2), lse.swapaxes(1, 2)), *parts])[0]


def _attend_layer(
    spec: AttentionSpec,
    scoring: Scoring,
    q: Float[Array, "B N T H"],
    keys: Float[Array, "L _ K _ H"],
    values: Float[Array, "L _ K _ H"],
    layer: Int[Array, ""],
    pages: Int[Array, "B _"] | None,
    q_positions: Int[Array, "B T"],
    k_positions: Int[Array, "B S"],
    q_segment_ids: Int[Array, "B T"],
    k_segment_ids: Int[Array, "B S"],
    head_parameters: Any,
) -> tuple[Float[Array, "B N T H"], Float[Array, "B N T"]]:
    """One device's rows and heads."""
    B, S = k_positions.shape
    bias = None
    if spec.score is not None:
        zeros = jnp.zeros((*q.shape[:3], S), jnp.float32)
        bias = with_position(spec, head_parameters, zeros, q_positions, k_positions)
    # What lies behind the last token is not fetched.
    lengths = jnp.where(k_segment_ids != 0, jnp.arange(1, S + 1)[None], 0).max(1)
    queries = Queries(q_positions, q_segment_ids)
    slots = Slots(k_positions, k_segment_ids, lengths, bias)
    first, chip = layer * keys.shape[1], target_chip()
    k, v = (x.reshape(-1, *x.shape[2:]) for x in (keys, values))
    if pages is not None:
        return paged_decode_attention(q, k, v, first + pages, scoring, queries, slots, chip=chip)
    rows = first + jnp.arange(B)
    return decode_attention(q, k, v, scoring, queries, slots, k_rows=rows, chip=chip)

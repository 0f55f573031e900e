"""The decode kernel behind the door of cached attention."""

from __future__ import annotations

import functools

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxlm.attention.inputs import AttentionInputs, AttentionSpec, CachedLayer
from jaxlm.attention.mask import AttentionMask, Interval
from jaxlm.attention.on_mesh import on_mesh
from jaxlm.attention.reference import visible
from kernels.chip import target_chip
from kernels.decode_attention import (
    MOST_ROWS,
    MOST_TOKENS,
    attend_new,
    decode_attention,
    merge,
)


def unsupported(spec: AttentionSpec, new: AttentionInputs) -> str | None:
    """What of a call the kernel does not do; None: it does it all."""
    if target_chip() is None:
        return "a device that is no TPU"
    T, N, H = new.q.shape[1:]
    if T > MOST_TOKENS or N * T > MOST_ROWS:
        return f"{T} tokens of {N} heads at once: that is prefill"
    if window_and_sinks(spec.mask) is None:
        return f"mask={spec.mask}"
    if spec.score is not None or new.q_far is not None:
        return "a position encoding that changes scores or has a ceiling"
    if H % 8 or H > 256:
        return f"head_dim={H}"
    if new.q.dtype not in (jnp.bfloat16, jnp.float32):
        return f"dtype={new.q.dtype}"
    return None


def window_and_sinks(mask: AttentionMask) -> tuple[int | None, int] | None:
    """(window or None, kept sinks) of a causal, sliding or Λ-shaped mask; None: another one."""
    near, *rest = mask.intervals
    if near != Interval(window=near.window) or len(rest) > 1:
        return None
    if not rest:
        return near.window, 0
    num_sinks = rest[0].below
    if near.window is None or num_sinks is None or rest[0] != Interval(below=num_sinks):
        return None
    return near.window, num_sinks


def attend_decode(
    spec: AttentionSpec, new: AttentionInputs, cached: CachedLayer
) -> Float[Array, "B T N H"]:
    """`attend_cached` by the kernel of `kernels.decode_attention`, for what it does.

    On a mesh set by `jax.set_mesh`, each device attends for its rows and its heads.
    """
    pattern = window_and_sinks(spec.mask)
    assert pattern is not None
    q, k, v = (a.swapaxes(1, 2) for a in (new.q, new.k, new.v))
    sizes, array = {"batch": k.shape[0], "kv_heads": k.shape[1]}, ("batch", "kv_heads")
    cache, row = (None, *array), ("batch",)
    run = on_mesh(
        functools.partial(_attend_layer, spec, *pattern),
        sizes,
        [array, cache, cache, (), row, row, row, row],
        [array, array],
    )
    parts = [
        run(
            *(q, cached.keys, cached.values, cached.layer),
            *(new.q_positions, cached.positions, new.q_segment_ids, cached.segment_ids),
        ),
        attend_new(q, k, v, visible(spec, new), scale=spec.scale, softcap=spec.softcap),
    ]
    if new.sink_logits is not None:
        out, lse = parts[0]
        sinks = new.sink_logits.astype(jnp.float32)[None, :, None]
        parts.append((jnp.zeros_like(out), jnp.broadcast_to(sinks, lse.shape)))
    return merge(parts)[0].swapaxes(1, 2)


def _attend_layer(
    spec: AttentionSpec,
    window: int | None,
    num_sinks: int,
    q: Float[Array, "B N T H"],
    keys: Float[Array, "L B K S H"],
    values: Float[Array, "L B K S H"],
    layer: Int[Array, ""],
    q_positions: Int[Array, "B T"],
    k_positions: Int[Array, "B S"],
    q_segment_ids: Int[Array, "B T"],
    k_segment_ids: Int[Array, "B S"],
) -> tuple[Float[Array, "B N T H"], Float[Array, "B N T"]]:
    """One device's rows and heads."""
    L, B, K, S, H = keys.shape
    # What lies behind the last token is not fetched.
    slots = jnp.arange(1, S + 1)[None]
    return decode_attention(
        q,
        keys.reshape(L * B, K, S, H),
        values.reshape(L * B, K, S, H),
        k_rows=layer * B + jnp.arange(B),
        q_positions=q_positions,
        k_positions=k_positions,
        lengths=jnp.where(k_segment_ids != 0, slots, 0).max(1),
        q_segment_ids=q_segment_ids,
        k_segment_ids=k_segment_ids,
        scale=spec.scale,
        softcap=spec.softcap,
        window=window,
        num_sinks=num_sinks,
    )

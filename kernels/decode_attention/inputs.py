"""Queries, positions and slopes as the kernels want them: as rows of one matmul."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kernels.decode_attention.scoring import EMPTY

SUBLANES = 8
MOST_TOKENS = 128
MOST_ROWS = 8192
CACHE_DTYPES = (jnp.bfloat16, jnp.float32, jnp.float8_e4m3fn)


def check_shapes(
    q: jax.Array,
    k: tuple[int, ...],
    v: tuple[int, ...],
    window: int | None,
    num_sinks: int,
) -> None:
    """Of q [B, N, T, H] and shapes [·, K, ·, H].

    Raises:
        ValueError: a shape or an option that no kernel of ours takes.
    """
    if q.ndim != 4 or k != v or len(k) != 4 or k[3] != q.shape[3]:
        raise ValueError(
            f"q={q.shape}, k={k}, v={v}; allowed: [B, N, T, H] and two equal shapes of rank 4 "
            "that end in the same H"
        )
    N, T, H = q.shape[1:]
    if N % k[1]:
        raise ValueError(f"q={q.shape}; allowed: N a multiple of k's K={k[1]}")
    if not 1 <= T <= MOST_TOKENS:
        raise ValueError(f"q={q.shape}; allowed: T from 1 to {MOST_TOKENS}, more is prefill")
    if N * T > MOST_ROWS:
        raise ValueError(f"q={q.shape}; allowed: N·T at most {MOST_ROWS}, or the state fills VMEM")
    if H % 8 or H > 256:
        raise ValueError(f"q={q.shape}; allowed: H a multiple of 8 up to 256")
    if q.dtype not in (jnp.bfloat16, jnp.float32):
        raise ValueError(f"q.dtype={q.dtype}; allowed: bfloat16, float32")
    if window is not None and window < 1:
        raise ValueError(f"window={window}; allowed: None or an integer >= 1")
    if num_sinks and window is None:
        raise ValueError(f"num_sinks={num_sinks}; allowed: 0 where there is no window")


def check_cache_dtype(dtype: jnp.dtype) -> None:
    """Of keys and values that are not quantized.

    Raises:
        ValueError: another dtype than those that are converted in VMEM.
    """
    if dtype not in CACHE_DTYPES:
        names = ", ".join(jnp.dtype(d).name for d in CACHE_DTYPES)
        raise ValueError(f"k.dtype={dtype}; allowed: {names}")


def check_lengths(q: jax.Array, lengths: jax.Array | None) -> None:
    """Of q [B, N, T, H].

    Raises:
        ValueError: not one length a sequence.
    """
    if lengths is not None and lengths.shape != q.shape[:1]:
        raise ValueError(f"lengths of shape {lengths.shape}; allowed: {q.shape[:1]}")


def pack_rows(q: jax.Array, kv_heads: int) -> jax.Array:
    """[B, N, T, H] → [B, K, R, H]: a group's query heads one after the other, padded."""
    B, N, T, H = q.shape
    q = q.reshape(B, kv_heads, N // kv_heads * T, H)
    return jnp.pad(q, ((0, 0), (0, 0), (0, -q.shape[2] % SUBLANES), (0, 0)))


def unpack_rows(x: jax.Array, num_heads: int, length: int) -> jax.Array:
    """[B, K, R, ...] → [B, N, T, ...]."""
    B, K = x.shape[:2]
    x = x[:, :, : num_heads // K * length]
    return x.reshape(B, num_heads, length, *x.shape[3:])


def describe_rows(
    q_positions: jax.Array, q_segment_ids: jax.Array | None, group: int, rows: int
) -> jax.Array:
    """int32 [B, R, 1 or 2]: position and segment of each row's query; padding sees nothing."""
    columns = [q_positions] if q_segment_ids is None else [q_positions, q_segment_ids]
    x = jnp.tile(jnp.stack(columns, -1).astype(jnp.int32), (1, group, 1))
    return jnp.pad(x, ((0, 0), (0, rows - x.shape[1]), (0, 0)), constant_values=-1)


def describe_keys(
    k_positions: jax.Array,
    k_segment_ids: jax.Array | None,
    lengths: jax.Array | None,
    slots: int,
) -> jax.Array:
    """int32 [B, 1 or 2, slots]: position and segment of each slot, EMPTY where none is seen."""
    S = k_positions.shape[1]
    used = k_positions >= 0
    if lengths is not None:
        used &= jnp.arange(S)[None] < lengths[:, None]
    if k_segment_ids is not None:
        used &= k_segment_ids != 0
    pad = ((0, 0), (0, slots - S))
    positions = jnp.where(used, k_positions.astype(jnp.int32), EMPTY)
    found = [jnp.pad(positions, pad, constant_values=EMPTY)]
    if k_segment_ids is not None:
        found.append(jnp.pad(k_segment_ids.astype(jnp.int32), pad))
    return jnp.stack(found, 1)


def describe_slopes(slopes: jax.Array, kv_heads: int, length: int, rows: int) -> jax.Array:
    """[N] → float32 [K, R, 1]."""
    x = jnp.repeat(slopes.astype(jnp.float32).reshape(kv_heads, -1), length, axis=1)
    return jnp.pad(x, ((0, 0), (0, rows - x.shape[1])))[..., None]

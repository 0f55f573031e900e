"""Queries, positions and biases as the kernels want them: as rows of one matmul."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kernels.chip import SCALAR_BYTES
from kernels.decode_attention.scoring import EMPTY, Queries, Slots
from kernels.decode_attention.softmax import LANES

MOST_TOKENS = 128
MOST_PARTS = 8  # pages of a block; of the last one some may be missing
INTEGERS = (jnp.int32, jnp.int16, jnp.int8)
CACHE_DTYPES = (jnp.bfloat16, jnp.float32, jnp.float8_e4m3fn)


def check_shapes(q: jax.Array, k: tuple[int, ...], v: tuple[int, ...]) -> None:
    """Of q [B, N, T, H] and shapes [·, K, ·, H].

    Raises:
        ValueError: a shape that no kernel of ours takes.
    """
    if q.ndim != 4 or k != v or len(k) != 4 or k[3] != q.shape[3]:
        raise ValueError(
            f"q={q.shape}, k={k}, v={v}; allowed: [B, N, T, H] and two equal shapes of rank 4 "
            "that end in the same H"
        )
    if 0 in q.shape or 0 in k:
        raise ValueError(f"q={q.shape}, k={k}; allowed: no axis of length 0")
    N, T, H = q.shape[1:]
    if N % k[1]:
        raise ValueError(f"q={q.shape}; allowed: N a multiple of k's K={k[1]}")
    if T > MOST_TOKENS:
        raise ValueError(f"q={q.shape}; allowed: T from 1 to {MOST_TOKENS}, more is prefill")
    if H % 8 or H > 256:
        raise ValueError(f"q={q.shape}; allowed: H a multiple of 8 up to 256")
    if q.dtype not in (jnp.bfloat16, jnp.float32):
        raise ValueError(f"q.dtype={q.dtype}; allowed: bfloat16, float32")


def check_cache_dtypes(k: jnp.dtype, v: jnp.dtype) -> None:
    """Of keys and values that are not quantized.

    Raises:
        ValueError: another dtype than those that are converted in VMEM, or two of them.
    """
    if k not in CACHE_DTYPES:
        names = ", ".join(jnp.dtype(d).name for d in CACHE_DTYPES)
        raise ValueError(f"k.dtype={k}; allowed: {names}")
    if v != k:
        raise ValueError(f"v.dtype={v}; allowed: k's, {k}")


def check_integers(name: str, array: jax.Array, shape: tuple[int, ...]) -> None:
    """Of numbers that a kernel has as int32.

    Raises:
        ValueError: another shape, or no integers of at most 32 bits.
    """
    if array.shape != shape:
        raise ValueError(f"{name} of shape {array.shape}; allowed: {shape}")
    if array.dtype not in INTEGERS:
        names = ", ".join(jnp.dtype(d).name for d in INTEGERS)
        raise ValueError(f"{name}.dtype={array.dtype}; allowed: {names}")


def table_bytes(batch: int, pages: int) -> int:
    """What scalar memory takes for a table of pages and the lengths: it pads rows to 1, 2, 4 or a
    multiple of 8, columns to a multiple of 128.
    """
    rows = -(-batch // 8) * 8 if batch > 4 else 1 << (batch - 1).bit_length()
    columns = -(-(pages + MOST_PARTS - 1) // LANES) * LANES
    return 4 * (rows * columns + -(-batch // LANES) * LANES)


def table_fits(batch: int, pages: int) -> bool:
    """Whether scalar memory holds a table of so many pages of each sequence."""
    return table_bytes(batch, pages) <= SCALAR_BYTES


def bias_fits(num_heads: int, length: int, slot_bytes: int) -> bool:
    """Whether a bias is read in the time of the cache at most.

    Args:
        num_heads, length: N and T.
        slot_bytes: of the keys and values of one slot, all heads.
    """
    return 4 * num_heads * length <= slot_bytes


def check_slots(q: jax.Array, queries: Queries, slots: Slots, S: int, slot_bytes: int) -> None:
    """Of q [B, N, T, H] and S slots, see `bias_fits`.

    Raises:
        ValueError: arrays that do not belong together, or a bias that is too large.
    """
    B, N, T, _ = q.shape
    for name, integers, shape in (
        ("queries.positions", queries.positions, (B, T)),
        ("queries.segment_ids", queries.segment_ids, (B, T)),
        ("slots.positions", slots.positions, (B, S)),
        ("slots.segment_ids", slots.segment_ids, (B, S)),
        ("slots.lengths", slots.lengths, (B,)),
    ):
        if integers is not None:
            check_integers(name, integers, shape)
    if slots.bias is not None and slots.bias.shape != (B, N, T, S):
        raise ValueError(f"slots.bias of shape {slots.bias.shape}; allowed: {(B, N, T, S)}")
    if (queries.segment_ids is None) != (slots.segment_ids is None):
        raise ValueError("segment_ids; allowed: of the queries and of all slots, or none")
    if slots.bias is not None and slots.bias.dtype != jnp.float32:
        raise ValueError(f"slots.bias.dtype={slots.bias.dtype}; allowed: float32")
    if slots.bias is not None and not bias_fits(N, T, slot_bytes):
        raise ValueError(
            f"bias of {4 * N * T} bytes a slot; allowed: at most {slot_bytes}, those of its keys "
            "and values"
        )


def pack_rows(q: jax.Array, kv_heads: int, rows: int) -> jax.Array:
    """[B, N, T, H] → [B, K, rows, H]: a group's query heads one after the other, padded."""
    B, N, T, H = q.shape
    q = q.reshape(B, kv_heads, N // kv_heads * T, H)
    return jnp.pad(q, ((0, 0), (0, 0), (0, rows - q.shape[2]), (0, 0)))


def unpack_rows(x: jax.Array, num_heads: int, length: int) -> jax.Array:
    """[B, K, R, ...] → [B, N, T, ...]."""
    B, K = x.shape[:2]
    x = x[:, :, : num_heads // K * length]
    return x.reshape(B, num_heads, length, *x.shape[3:])


def pack_bias(bias: jax.Array, kv_heads: int, rows: int, slots: int) -> jax.Array:
    """[B, N, T, S] → [B, K, rows, slots]: rows as `pack_rows` has them."""
    pad = ((0, 0), (0, 0), (0, 0), (0, slots - bias.shape[3]))
    return jnp.pad(pack_rows(bias, kv_heads, rows), pad)


def describe_rows(queries: Queries, group: int, rows: int) -> jax.Array:
    """int32 [B, R, 1 or 2]: position and segment of each row's query; padding sees nothing."""
    # Below -1, the distance to an empty slot's position would be more than an int32 holds; at that
    # position, it would be seen.
    columns = [queries.positions.astype(jnp.int32).clip(-1, EMPTY - 1)]
    if queries.segment_ids is not None:
        columns.append(queries.segment_ids.astype(jnp.int32))
    x = jnp.tile(jnp.stack(columns, -1), (1, group, 1))
    return jnp.pad(x, ((0, 0), (0, rows - x.shape[1]), (0, 0)), constant_values=-1)


def blocks_in_use(lengths: jax.Array, num_slots: int, block: int) -> jax.Array:
    """int32 [B] of lengths, of which one past the slots is that of all."""
    return (lengths.astype(jnp.int32).clip(0, num_slots) + block - 1) // block


def describe_keys(slots: Slots, number: int) -> jax.Array:
    """int32 [B, 1 or 2, number]: position and segment of each slot, EMPTY where none is seen."""
    S = slots.positions.shape[1]
    used = slots.positions >= 0
    if slots.lengths is not None:
        used &= jnp.arange(S)[None] < slots.lengths[:, None]
    if slots.segment_ids is not None:
        used &= slots.segment_ids != 0
    pad = ((0, 0), (0, number - S))
    positions = jnp.where(used, slots.positions.astype(jnp.int32), EMPTY)
    found = [jnp.pad(positions, pad, constant_values=EMPTY)]
    if slots.segment_ids is not None:
        found.append(jnp.pad(slots.segment_ids.astype(jnp.int32), pad))
    return jnp.stack(found, 1)

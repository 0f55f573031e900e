"""Attention of 1 to 128 query tokens a sequence to a long cache of 8-, 4- and 2-bit numbers, or of
float8 with a scale per token.

    zones = [
        Zone(recent_keys, recent_values, Slots(positions)),              # full precision
        Zone(quantize_keys(k, bits=4), quantize_values(v, bits=4), Slots(older_positions)),
    ]
    cached = quantized_decode_attention(q, zones, Scoring(scale=…), Queries(…))
    out, _ = merge([cached, attend_new(…)])

Codes become numbers in VMEM only; scales are not multiplied into keys or values: see `dequantize`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels.decode_attention import inputs
from kernels.decode_attention.merge import merge_splits
from kernels.decode_attention.scoring import Queries, Scoring, Slots
from kernels.decode_attention.softmax import LANES
from kernels.kv_quantize.layout import BLOCK, Quantized
from kernels.kv_quantize.scaled import Scaled
from kernels.quantized_decode_attention.kernel import MOST_ROWS, Plan, call
from kernels.quantized_decode_attention.reference import reference
from kernels.quantized_decode_attention.zone import Kept, Zone

__all__ = [
    "Queries",
    "Scoring",
    "Slots",
    "Zone",
    "cost_estimate",
    "quantized_decode_attention",
    "reference",
]

# Most of a grid step: its fixed part, ~0.5 µs on v5e, is then small beside the rest with 4 bits.
BLOCK_TOKENS = 16384
BLOCK_BYTES = 1 << 20  # of codes: four such blocks and the scores fit the 16 MiB of a v4
# Most that exist at one time. Softmax and matmul wait for each other between tiles, so one tile a
# block is best where rows are few.
MOST_SCORES = 1 << 16


def quantized_decode_attention(
    q: jax.Array,
    zones: Sequence[Zone],
    scoring: Scoring,
    queries: Queries,
    *,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array]:
    """One softmax over all slots of all zones, as `kernels.decode_attention` defines it.

    Args:
        q: bfloat16 or float32 [B, N, T, H], T <= 128, H 64, 128 or 256.
        zones: any number, each of a multiple of 128 slots.
        scoring: which slots are seen, and what becomes of q·k.
        queries: what is known of them.
        interpret: for tests only.

    Returns:
        out [B, N, T, H] in q's dtype, and lse float32 [B, N, T].

    Raises:
        ValueError: a shape, dtype or combination that is not supported.
    """
    if not zones:
        raise ValueError("zones=[]; allowed: at least one Zone")
    B, N, T, _ = q.shape
    for zone in zones:
        _check(q, zone, queries)
    K = _shape(zones[0].keys)[1]
    rows = inputs.pack_rows(q, K)
    R = rows.shape[2]
    plans = _plans(zones, R)
    # As in decode_attention: two cores share what is independent.
    splits = 2 if B % 2 and B < 8 and sum(plan.count for plan in plans) > 1 else 1
    out, lse = call(
        scoring,
        plans,
        splits,
        _blocks_in_use(zones, plans, B),
        inputs.describe_rows(queries, N // K, R),
        rows,
        [_arrays(zone, K) for zone in zones],
        cost_estimate(q, zones),
        interpret,
    )
    out, lse = merge_splits(out, lse, N, T)
    return out.astype(q.dtype), lse


def cost_estimate(q: jax.Array, zones: Sequence[Zone]) -> pl.CostEstimate:
    """Every zone is read once."""
    B, N, T, H = q.shape
    slots = sum(zone.num_slots for zone in zones)
    cache = sum(zone.keys.nbytes + zone.values.nbytes for zone in zones)
    cache += sum(zone.slots.bias.nbytes for zone in zones if zone.slots.bias is not None)
    return pl.CostEstimate(
        flops=4 * B * N * T * slots * H,
        transcendentals=B * N * T * slots,
        bytes_accessed=cache + 4 * B * slots + 2 * q.size * q.dtype.itemsize + 4 * B * N * T,
    )


def _shape(x: Kept) -> tuple[int, ...]:
    """[B, K, S, H]."""
    if isinstance(x, Scaled):
        return x.numbers.shape
    if isinstance(x, Quantized):
        B, K, rows, H = x.codes.shape
        return B, K, rows if x.bits == 8 else rows * 32 // x.bits, H
    return x.shape


def _check(q: jax.Array, zone: Zone, queries: Queries) -> None:
    keys, values, S = zone.keys, zone.values, zone.num_slots
    shape, dtypes = _shape(keys), list[int | str]()
    inputs.check_shapes(q, shape, _shape(values))
    for x in (keys, values):
        if isinstance(x, Quantized):
            dtypes.append(x.bits)
        else:
            dtypes.append(f"scaled {x.numbers.dtype}" if isinstance(x, Scaled) else str(x.dtype))
    if dtypes[0] != dtypes[1]:
        raise ValueError(f"keys of {dtypes[0]}, values of {dtypes[1]}; allowed: equal precision")
    if not isinstance(keys, Quantized):
        inputs.check_cache_dtype((keys.numbers if isinstance(keys, Scaled) else keys).dtype)
    if shape[0] != q.shape[0] or S % BLOCK:
        raise ValueError(
            f"keys={shape}; allowed: [B, K, S, H] with q's B={q.shape[0]} and S a multiple of "
            f"{BLOCK}"
        )
    if q.shape[3] not in (64, 128, 256):
        raise ValueError(f"q={q.shape}; allowed: H 64, 128 or 256")
    slot_bytes = (keys.nbytes + values.nbytes) // (shape[0] * S)
    inputs.check_slots(q, queries, zone.slots, shape[2], slot_bytes)


def _plans(zones: Sequence[Zone], rows: int) -> tuple[Plan, ...]:
    plans: list[Plan] = []
    for zone in zones:
        plans.append(_plan(zone, sum(plan.count for plan in plans), rows))
    return tuple(plans)


def _plan(zone: Zone, first: int, rows: int) -> Plan:
    S, H = _shape(zone.keys)[2:]
    bits, groups = None, (1, H)
    if isinstance(zone.keys, Quantized) and isinstance(zone.values, Quantized):
        bits, groups = zone.keys.bits, (zone.keys.group, zone.values.group)
    codes, *scales = _arrays_of(zone.keys)
    scaled = bool(scales) and bits is None
    most = min(BLOCK_TOKENS, BLOCK_BYTES * S * codes.shape[0] * codes.shape[1] // codes.nbytes)
    block = next(n for n in range(min(most // LANES * LANES, S), 0, -LANES) if S % n == 0)
    most = MOST_SCORES // min(rows, MOST_ROWS)
    tile = next(n for n in range(min(most, block), 0, -LANES) if block % n == 0)
    biased = zone.slots.bias is not None
    return Plan(bits, scaled, *groups, block, tile, first, S // block, biased)


def _blocks_in_use(zones: Sequence[Zone], plans: Sequence[Plan], batch: int) -> jax.Array | None:
    """int32 [zones, B], or None: all."""
    if all(zone.slots.lengths is None for zone in zones):
        return None
    found = []
    for zone, plan in zip(zones, plans, strict=True):
        lengths = zone.slots.lengths
        lengths = jnp.full(batch, zone.num_slots) if lengths is None else lengths
        used = (lengths.astype(jnp.int32) + plan.block - 1) // plan.block
        found.append(jnp.minimum(used, plan.count))  # a length past the zone must not be read
    return jnp.stack(found)


def _arrays(zone: Zone, kv_heads: int) -> list[jax.Array]:
    S, bias = zone.num_slots, zone.slots.bias
    found = [inputs.describe_keys(zone.slots, S)]
    for x in (zone.keys, zone.values):
        found += _arrays_of(x)
    return found if bias is None else [*found, inputs.pack_bias(bias, kv_heads, S)]


def _arrays_of(x: Kept) -> list[jax.Array]:
    """What is kept, as the kernel takes it; then scales, if any."""
    if isinstance(x, Quantized):
        return [x.codes, x.affine]
    return [x.numbers, x.scale[:, :, None]] if isinstance(x, Scaled) else [x]

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

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels.chip import chip_or_target
from kernels.decode_attention import inputs
from kernels.decode_attention.blocks import Cut, cuts, state_bytes, vmem_bytes
from kernels.decode_attention.merge import merge_splits
from kernels.decode_attention.scoring import Queries, Scoring, Slots
from kernels.decode_attention.softmax import LANES
from kernels.kv_quantize.layout import Quantized
from kernels.kv_quantize.scaled import Scaled
from kernels.quantized_decode_attention.check import check
from kernels.quantized_decode_attention.kernel import PLAIN_TILES, Plan, call
from kernels.quantized_decode_attention.reference import reference
from kernels.quantized_decode_attention.zone import Kept, Zone, cache_shape

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
BLOCK_BYTES = 1 << 20  # of codes
# Most that exist at one time. Softmax and matmul wait for each other between tiles, so one tile a
# block is best where rows are few.
MOST_SCORES = 1 << 16
MOST_TILES = 8  # of a block: no more are needed for a step to be long
# Whose matrix units are as wide as the vectors are; those of later ones are twice as wide.
NARROW = ("v4", "v5e", "v5p")


def quantized_decode_attention(
    q: jax.Array,
    zones: Sequence[Zone],
    scoring: Scoring,
    queries: Queries,
    *,
    k_rows: jax.Array | None = None,
    chip: str | None = None,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array]:
    """One softmax over all slots of all zones, as `kernels.decode_attention` defines it.

    Args:
        q: bfloat16 or float32 [B, N, T, H], T <= 128, H 64, 128 or 256.
        zones: any number, each of a multiple of 128 slots. With `k_rows`, keys and values have
            any number of rows.
        scoring: which slots are seen, and what becomes of q·k.
        queries: what is known of them.
        k_rows: int [B], the row of keys and values that a sequence reads, such as its own in one
            layer of [layers·B, K, …]; None: each its own.
        chip: TPU generation, for the sizes of blocks; None: that which is traced for.
        interpret: for tests only.

    Returns:
        out [B, N, T, H] in q's dtype, and lse float32 [B, N, T].

    Raises:
        ValueError: a shape, dtype or combination that is not supported.
    """
    check(q, zones, queries, k_rows)
    B, N, T, _ = q.shape
    K, chip = cache_shape(zones[0].keys)[1], chip_or_target(chip)
    plans, cut, splits = _fit(q, zones, chip)
    R = cut.all_rows
    out, lse = call(
        scoring,
        plans,
        cut,
        splits,
        _blocks_in_use(zones, plans, B),
        None if k_rows is None else k_rows.astype(jnp.int32),
        inputs.describe_rows(queries, N // K, R),
        inputs.pack_rows(q, K, R),
        [_arrays(zone, K, R) for zone in zones],
        cost_estimate(q, zones),
        vmem_bytes(chip),
        interpret,
    )
    out, lse = merge_splits(out, lse, N, T)
    return out.astype(q.dtype), lse


def cost_estimate(q: jax.Array, zones: Sequence[Zone]) -> pl.CostEstimate:
    """Every zone is read once."""
    B, N, T, H = q.shape
    slots = sum(zone.num_slots for zone in zones)
    # Of as many rows as there are sequences.
    arrays = (x for zone in zones for x in (zone.keys, zone.values))
    cache = sum(x.nbytes // cache_shape(x)[0] * B for x in arrays)
    cache += sum(zone.slots.bias.nbytes for zone in zones if zone.slots.bias is not None)
    return pl.CostEstimate(
        flops=4 * B * N * T * slots * H,
        transcendentals=B * N * T * slots,
        bytes_accessed=cache + 4 * B * slots + 2 * q.size * q.dtype.itemsize + 4 * B * N * T,
    )


def _fit(q: jax.Array, zones: Sequence[Zone], chip: str) -> tuple[tuple[Plan, ...], Cut, int]:
    """Zones cut into blocks, queries into pieces, and the number of splits: the largest blocks, and
    of them the coarsest cut, that fit into the chip's VMEM.

    Raises:
        ValueError: none does.
    """
    (B, N, T, H), K = q.shape, cache_shape(zones[0].keys)[1]
    limit = _limit(chip)
    least = max(_block_bytes(zone, LANES, H) for zone in zones)
    most = max(BLOCK_BYTES, least)
    while most >= least:
        for cut in cuts(K, N // K * T):
            plans = _plans(zones, cut, most, q, chip)
            # As in decode_attention: two cores share what is independent.
            pieces, count = B * cut.pieces, sum(plan.count for plan in plans)
            splits = 2 if pieces % 2 and pieces < 8 and count > 1 else 1
            if _step_bytes(zones, plans, cut, splits, q, K) <= limit:
                return plans, cut, splits
        most //= 2
    raise ValueError(
        f"zones of S={[zone.num_slots for zone in zones]}, q={q.shape}; allowed: what fits {limit} "
        f"bytes of VMEM on {chip}: fewer zones, of S a multiple of 8 groups of keys"
    )


def _limit(chip: str) -> int:
    """Of `_step_bytes`: with groups of 16 the compiler spills up to a third more."""
    return vmem_bytes(chip) * 3 // 4


def _step_bytes(
    zones: Sequence[Zone], plans: Sequence[Plan], cut: Cut, splits: int, q: jax.Array, K: int
) -> int:
    """Of VMEM that a call takes."""
    H, itemsize = q.shape[3], q.dtype.itemsize
    blocks = sum(
        _block_bytes(zone, plan.block, H) + plan.biased * cut.piece_rows * plan.block * 4
        for zone, plan in zip(zones, plans, strict=True)
    )
    worked_out = max(
        plan.tile * _worked_out(plan, cut.tile, H, itemsize) * plan.copies for plan in plans
    )
    return 2 * blocks + worked_out + state_bytes(cut, K // cut.heads, H, itemsize, splits)


def _worked_out(plan: Plan, rows: int, H: int, itemsize: int) -> int:
    """Bytes for each token of a tile: twice the operands and results of its matmuls."""
    # A float32 operand of a matmul is split into three of bfloat16.
    operand = 4 + 3 * 2 if itemsize == 4 else 2
    numbers = max(H, LANES) * (2 + operand)
    if plan.bits is None:
        return 2 * (numbers + rows * (3 * 4 + operand))
    of_keys, of_values = LANES // plan.key_group * rows * 4, H // plan.value_group * rows
    return 2 * (numbers + of_keys + of_values * (4 + operand) + rows * 3 * 4)


def _block_bytes(zone: Zone, tokens: int, H: int) -> int:
    """Of positions, keys, values and their scales, as they lie in VMEM: 8 rows of 128 lanes."""
    width, described = max(H, LANES), 8 * 4 * tokens
    keys, values = zone.keys, zone.values
    if isinstance(keys, Quantized) and isinstance(values, Quantized):
        affine = _up8(tokens // keys.group) * width * 4 + _up8(H // values.group) * tokens * 4
        return described + 2 * tokens * width * keys.bits // 8 + affine
    numbers, *scales = _arrays_of(keys)
    return described + 2 * tokens * (width * numbers.dtype.itemsize + 8 * 4 * len(scales))


def _up8(n: int) -> int:
    return -(-n // 8) * 8


def _plans(
    zones: Sequence[Zone], cut: Cut, most_bytes: int, q: jax.Array, chip: str
) -> tuple[Plan, ...]:
    plans: list[Plan] = []
    for zone in zones:
        first = sum(plan.count for plan in plans)
        plans.append(_plan(zone, first, cut, most_bytes, q, chip))
    return tuple(plans)


def _plan(zone: Zone, first: int, cut: Cut, most_bytes: int, q: jax.Array, chip: str) -> Plan:
    S, H = cache_shape(zone.keys)[2:]
    bits, groups = None, (1, H)
    if isinstance(zone.keys, Quantized) and isinstance(zone.values, Quantized):
        bits, groups = zone.keys.bits, (zone.keys.group, zone.values.group)
    codes, *scales = _arrays_of(zone.keys)
    scaled = bool(scales) and bits is None
    most = min(BLOCK_TOKENS, most_bytes * S * codes.shape[0] * codes.shape[1] // codes.nbytes)
    whole = Plan(bits, scaled, *groups, LANES, S, S, first, 1, zone.slots.bias is not None)
    # Half is for what is worked out, half for blocks and state.
    room = _limit(chip) // 2
    tile = min(MOST_SCORES // cut.tile, room // _worked_out(whole, cut.tile, H, q.dtype.itemsize))
    tile = max(LANES, tile // LANES * LANES)
    block, tile = divided(S, min(most, MOST_TILES * tile), tile, groups[0])
    run = LANES if chip in NARROW else math.gcd(tile, 2 * LANES)
    return dataclasses.replace(whole, run=run, block=block, tile=tile, count=S // block)


def divided(S: int, most: int, longest: int, group: int) -> tuple[int, int]:
    """The longest block of about `most` tokens that divides S, and of it the longest tile; if there
    is one, a block whose tiles a loop can take.
    """

    def divisors(n: int, most: int) -> Iterator[int]:
        return (d for d in range(min(most, n) // LANES * LANES, 0, -LANES) if n % d == 0)

    # A block's scales of keys are whole registers, or all that there are.
    blocks = [n for n in divisors(S, S) if n == S or n % (8 * group) == 0]
    fitting = [n for n in blocks if n <= most] or blocks[-1:]
    for block in fitting:
        for tile in divisors(block, longest):
            if block // tile <= PLAIN_TILES or tile % (8 * group) == 0:
                return block, tile
    return fitting[0], next(divisors(fitting[0], longest))


def _blocks_in_use(zones: Sequence[Zone], plans: Sequence[Plan], batch: int) -> jax.Array | None:
    """int32 [zones, B], or None: all."""
    if all(zone.slots.lengths is None for zone in zones):
        return None
    found = []
    for zone, plan in zip(zones, plans, strict=True):
        lengths = zone.slots.lengths
        lengths = jnp.full(batch, zone.num_slots) if lengths is None else lengths
        found.append(inputs.blocks_in_use(lengths, zone.num_slots, plan.block))
    return jnp.stack(found)


def _arrays(zone: Zone, kv_heads: int, rows: int) -> list[jax.Array]:
    S, bias = zone.num_slots, zone.slots.bias
    found = [inputs.describe_keys(zone.slots, S)]
    for x in (zone.keys, zone.values):
        found += _arrays_of(x)
    return found if bias is None else [*found, inputs.pack_bias(bias, kv_heads, rows, S)]


def _arrays_of(x: Kept) -> list[jax.Array]:
    """What is kept, as the kernel takes it; then scales, if any."""
    if isinstance(x, Quantized):
        return [x.codes, x.affine]
    return [x.numbers, x.scale[:, :, None]] if isinstance(x, Scaled) else [x]

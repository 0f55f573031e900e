"""Errors at the door: zones that no kernel takes, or that do not belong together."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from kernels.decode_attention import inputs
from kernels.decode_attention.scoring import Queries
from kernels.kv_quantize.layout import BITS, BLOCK, GROUPS, Quantized, rows_of_codes
from kernels.kv_quantize.scaled import Scaled
from kernels.quantized_decode_attention.zone import Kept, Zone, cache_shape


def check(q: jax.Array, zones: Sequence[Zone], queries: Queries, k_rows: jax.Array | None) -> None:
    """Of all arguments that are arrays.

    Raises:
        ValueError: a shape, dtype or combination that is not supported.
    """
    if not zones:
        raise ValueError("zones=[]; allowed: at least one Zone")
    if k_rows is not None:
        inputs.check_integers("k_rows", k_rows, q.shape[:1])
    for zone in zones:
        _check_zone(q, zone, queries, k_rows is not None)
    first = cache_shape(zones[0].keys)[1]
    for zone in zones[1:]:
        K = cache_shape(zone.keys)[1]
        if first != K:
            raise ValueError(f"zones of K={first} and K={K}; allowed: one K in all zones")


def _check_zone(q: jax.Array, zone: Zone, queries: Queries, any_rows: bool) -> None:
    keys, values = zone.keys, zone.values
    precisions = [_precision(x) for x in (keys, values)]
    if precisions[0] != precisions[1]:
        raise ValueError(
            f"keys of {precisions[0]}, values of {precisions[1]}; allowed: equal precision"
        )
    for name, x in (("keys", keys), ("values", values)):
        _check_arrays(name, x)
    shape = cache_shape(keys)
    inputs.check_shapes(q, shape, cache_shape(values))
    B, S, H = shape[0], shape[2], shape[3]
    if (q.shape[0] != B and not any_rows) or S % BLOCK:
        raise ValueError(
            f"keys={shape}; allowed: [B, K, S, H] with q's B={q.shape[0]}, or k_rows, and S a "
            f"multiple of {BLOCK}"
        )
    if H not in (64, 128, 256):
        raise ValueError(f"q={q.shape}; allowed: H 64, 128 or 256")
    if isinstance(keys, Quantized) and isinstance(values, Quantized):
        _check_scales("keys", keys, (*shape[:2], S // keys.group, H))
        if H % values.group:
            raise ValueError(f"values.group={values.group}; allowed: a divisor of H={H}")
        _check_scales("values", values, (*shape[:2], H // values.group, S))
    slot_bytes = (keys.nbytes + values.nbytes) // (B * S)
    inputs.check_slots(q, queries, zone.slots, S, slot_bytes)


def _precision(x: Kept) -> str:
    if isinstance(x, Quantized):
        return f"{x.bits} bits"
    return f"scaled {x.numbers.dtype}" if isinstance(x, Scaled) else str(x.dtype)


def _check_arrays(name: str, x: Kept) -> None:
    """Dtypes, ranks, and the scales of what is no codes."""
    if isinstance(x, Quantized):
        if x.bits not in BITS:
            raise ValueError(f"{name}.bits={x.bits}; allowed: {', '.join(map(str, BITS))}")
        if x.group not in GROUPS:
            raise ValueError(f"{name}.group={x.group}; allowed: {', '.join(map(str, GROUPS))}")
        wanted = jnp.int8 if x.bits == 8 else jnp.int32
        rows = rows_of_codes(BLOCK, x.bits)
        if x.codes.ndim != 4 or x.codes.dtype != wanted or x.codes.shape[2] % rows:
            raise ValueError(
                f"{name}.codes={x.codes.dtype}{x.codes.shape}; allowed: "
                f"{jnp.dtype(wanted).name} [B, K, rows, H] with rows a multiple of {rows}"
            )
        return
    numbers = x.numbers if isinstance(x, Scaled) else x
    inputs.check_cache_dtypes(numbers.dtype, numbers.dtype)
    if isinstance(x, Scaled) and (
        x.scale.shape != numbers.shape[:3] or x.scale.dtype != jnp.float32
    ):
        raise ValueError(
            f"{name}.scale={x.scale.dtype}{x.scale.shape}; allowed: float32{numbers.shape[:3]}"
        )


def _check_scales(name: str, x: Quantized, shape: tuple[int, ...]) -> None:
    if x.affine.shape != shape or x.affine.dtype != jnp.int32:
        raise ValueError(f"{name}.affine={x.affine.dtype}{x.affine.shape}; allowed: int32{shape}")

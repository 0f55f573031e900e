"""What `quantized_decode_attention` computes, written down plainly: the oracle of its tests."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from kernels.decode_attention.reference import reference as attend
from kernels.decode_attention.scoring import Queries, Scoring, Slots
from kernels.kv_quantize.layout import Quantized
from kernels.kv_quantize.reference import dequantize_keys, dequantize_values
from kernels.kv_quantize.scaled import Scaled, from_float8
from kernels.quantized_decode_attention.zone import Kept, Zone


def reference(
    q: jax.Array, zones: Sequence[Zone], scoring: Scoring, queries: Queries
) -> tuple[jax.Array, jax.Array]:
    """All zones dequantized to float32, side by side, then `decode_attention`'s reference."""

    def keys(x: Kept) -> jax.Array:
        return dequantize_keys(x) if isinstance(x, Quantized) else numbers(x)

    def values(x: Kept) -> jax.Array:
        return dequantize_values(x) if isinstance(x, Quantized) else numbers(x)

    def numbers(x: jax.Array | Scaled) -> jax.Array:
        return from_float8(x) if isinstance(x, Scaled) else x.astype(jnp.float32)

    def positions(z: Zone) -> jax.Array:
        """-1 also where a slot is not in use."""
        lengths = z.slots.lengths
        if lengths is None:
            return z.slots.positions
        used = jnp.arange(z.num_slots)[None] < lengths[:, None]
        return jnp.where(used, z.slots.positions, -1)

    def bias(z: Zone) -> jax.Array:
        """Zero where there is none."""
        shape = (*q.shape[:3], z.num_slots)
        return jnp.zeros(shape) if z.slots.bias is None else z.slots.bias

    segments = [z.slots.segment_ids for z in zones if z.slots.segment_ids is not None]
    slots = Slots(
        jnp.concatenate([positions(z) for z in zones], 1),
        jnp.concatenate(segments, 1) if segments else None,
        bias=jnp.concatenate([bias(z) for z in zones], 3),
    )
    k = jnp.concatenate([keys(z.keys) for z in zones], 2)
    v = jnp.concatenate([values(z.values) for z in zones], 2)
    return attend(q, k, v, scoring, queries, slots)

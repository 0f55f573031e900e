"""What `quantized_decode_attention` computes, written down plainly: the oracle of its tests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from kernels.decode_attention.reference import reference as attend
from kernels.kv_quantize.layout import Quantized
from kernels.kv_quantize.reference import dequantize_keys, dequantize_values
from kernels.quantized_decode_attention.zone import Zone


def reference(
    q: jax.Array, zones: Sequence[Zone], *, q_positions: jax.Array, **options: Any
) -> tuple[jax.Array, jax.Array]:
    """All zones dequantized to float32, side by side, then `decode_attention`'s reference."""

    def keys(x: jax.Array | Quantized) -> jax.Array:
        return dequantize_keys(x) if isinstance(x, Quantized) else x.astype(jnp.float32)

    def values(x: jax.Array | Quantized) -> jax.Array:
        return dequantize_values(x) if isinstance(x, Quantized) else x.astype(jnp.float32)

    def positions(z: Zone) -> jax.Array:
        """-1 also where a slot is not in use."""
        if z.lengths is None:
            return z.positions
        return jnp.where(jnp.arange(z.num_slots)[None] < z.lengths[:, None], z.positions, -1)

    segments = [z.segment_ids for z in zones if z.segment_ids is not None]
    return attend(
        q,
        jnp.concatenate([keys(z.keys) for z in zones], 2),
        jnp.concatenate([values(z.values) for z in zones], 2),
        q_positions=q_positions,
        k_positions=jnp.concatenate([positions(z) for z in zones], 1),
        k_segment_ids=jnp.concatenate(segments, 1) if segments else None,
        **options,
    )

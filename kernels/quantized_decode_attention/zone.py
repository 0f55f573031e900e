"""A part of a cache, of one precision."""

from __future__ import annotations

import dataclasses
import functools

import jax

from kernels.kv_quantize.layout import Quantized


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["keys", "values", "positions", "segment_ids", "lengths"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class Zone:
    """S slots of every sequence.

    Attributes:
        keys, values: arrays [B, K, S, H], or both Quantized.
        positions: int [B, S] of the token in each slot, -1 where it is empty.
        segment_ids: int [B, S], or None; in all zones or in none.
        lengths: int [B], slots in use; blocks past it are not fetched. None: all.
    """

    keys: jax.Array | Quantized
    values: jax.Array | Quantized
    positions: jax.Array
    segment_ids: jax.Array | None = None
    lengths: jax.Array | None = None

    @property
    def num_slots(self) -> int:
        """S."""
        return self.positions.shape[1]

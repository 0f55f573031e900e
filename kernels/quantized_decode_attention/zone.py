"""A part of a cache, of one precision."""

from __future__ import annotations

import dataclasses

import jax

from kernels.decode_attention.scoring import Slots
from kernels.kv_quantize.layout import Quantized
from kernels.kv_quantize.scaled import Scaled

Kept = jax.Array | Quantized | Scaled


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Zone:
    """S slots of every sequence.

    Attributes:
        keys, values: arrays [B, K, S, H], or both Quantized, or both Scaled.
        slots: what is known of them; segment ids in all zones or in none.
    """

    keys: Kept
    values: Kept
    slots: Slots

    @property
    def num_slots(self) -> int:
        """S."""
        return self.slots.positions.shape[1]

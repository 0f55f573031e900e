"""A part of a cache, of one precision."""

from __future__ import annotations

import dataclasses

import jax

from kernels.decode_attention.scoring import Slots
from kernels.kv_quantize.layout import Quantized, tokens_of_codes
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


def cache_shape(x: Kept) -> tuple[int, ...]:
    """[B, K, S, H]."""
    if isinstance(x, Scaled):
        return x.numbers.shape
    if isinstance(x, Quantized):
        B, K, rows, H = x.codes.shape
        return B, K, tokens_of_codes(rows, x.bits), H
    return x.shape

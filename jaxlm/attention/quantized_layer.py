"""A layer of a cache's zone of few bits."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
from jaxtyping import Array, Float, Int

from kernels.kv_quantize.layout import BLOCK, Quantized, rows_of_codes
from kernels.kv_quantize.reference import dequantize_keys, dequantize_values


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QuantizedLayer:
    """What a zone holds of one layer, as `CachedLayer`; see `kernels.kv_quantize.layout`."""

    keys: Quantized
    values: Quantized
    layer: Int[Array, ""]
    positions: Int[Array, "B S"]
    segment_ids: Int[Array, "B S"]

    def block_of_keys(self, start: Array, length: int, dtype: Any) -> Float[Array, "B S K H"]:
        """As numbers; start and length are multiples of 128."""
        g = self.keys.group
        affine = self._cut(self.keys.affine, start // g, length // g)
        return dequantize_keys(self._block(self.keys, start, length, affine), dtype).swapaxes(1, 2)

    def block_of_values(self, start: Array, length: int, dtype: Any) -> Float[Array, "B K S H"]:
        """As numbers, heads outside of time."""
        affine = self._cut(self.values.affine, start, length, 4)
        return dequantize_values(self._block(self.values, start, length, affine), dtype)

    def cut_out(self) -> tuple[Quantized, Quantized]:
        """Keys and values of this layer alone."""

        def own(x: Array) -> Array:
            return self._cut(x, 0, x.shape[3])

        return jax.tree.map(own, self.keys), jax.tree.map(own, self.values)

    def _block(self, x: Quantized, start: Array, length: int, affine: Array) -> Quantized:
        first = start // BLOCK * rows_of_codes(BLOCK, x.bits)
        codes = self._cut(x.codes, first, rows_of_codes(length, x.bits))
        return dataclasses.replace(x, codes=codes, affine=affine)

    def _cut(self, x: Array, start: Any, length: int, axis: int = 3) -> Array:
        """Of this layer."""
        at: list[Any] = [self.layer, 0, 0, 0, 0]
        at[axis] = start
        size = [1, *x.shape[1:]]
        size[axis] = length
        return jax.lax.dynamic_slice(x, at, size)[0]

"""The static half of a call, and what both kernels do with a tile of logits."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from kernels.cross_entropy.blocks import Blocks
from kernels.precision import product

LANES = 128
# Below all logits, and so small that the cap's derivative there is finite: it meets p = 0.
HIDDEN = -1e15


@dataclasses.dataclass(frozen=True)
class Call:
    """One call.

    Attributes:
        blocks: sizes.
        vocab: V.
        vocab_axis: of the matrix: 1 for [D, V], 0 for [V, D].
        softcap: logits become softcap·tanh(logits / softcap); None: they don't.
        precision: of matrix products, those of the backward pass too.
    """

    blocks: Blocks
    vocab: int
    vocab_axis: int
    softcap: float | None
    precision: jax.lax.Precision

    @property
    def num_vocab_blocks(self) -> int:
        """The last may reach beyond the vocabulary."""
        return -(-self.vocab // self.blocks.vocab)

    @property
    def tail(self) -> int:
        """Entries of the last block that are in the vocabulary; 0: all."""
        return self.vocab % self.blocks.vocab

    def read(self, matrix: Any, last: bool) -> jax.Array:
        """A block of the matrix, zero beyond the vocabulary: what lies there may be NaN."""
        w = matrix[...]
        if not last:
            return w
        entry = jax.lax.broadcasted_iota(jnp.int32, w.shape, self.vocab_axis)
        return jnp.where(entry < self.tail, w, jnp.zeros_like(w))

    def dot(self, a: jax.Array, b: jax.Array, dims: Any) -> jax.Array:
        """A matrix product in float32."""
        return product(a, b, dims, self.precision)

    def logits(self, h: jax.Array, w: jax.Array, bias: jax.Array, last: bool) -> jax.Array:
        """Capped, float32 [tile, vocab block]; HIDDEN beyond the vocabulary."""
        contract = (((1,), (1 - self.vocab_axis,)), ((), ()))
        s = self.dot(h, w, contract) + bias
        if self.softcap is not None:
            s = self.softcap * jnp.tanh(s / self.softcap)
        return jnp.where(columns(s) < self.tail, s, HIDDEN) if last else s

    def slope(self, s: jax.Array) -> jax.Array | float:
        """The derivative of the cap, from capped logits."""
        return 1.0 if self.softcap is None else 1 - (s / self.softcap) ** 2


def columns(s: jax.Array) -> jax.Array:
    """Number of each column."""
    return jax.lax.broadcasted_iota(jnp.int32, s.shape, 1)

"""T5's relative bias: one trained number per head and bucket of distances."""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from jaxlm.positions.encoding import MAX_POSITION, Dimensions, Parameter, PositionEncoding, require
from jaxlm.positions.registry import register


def bucket(distance: Int[Array, "*T"], num_buckets: int, max_distance: int) -> Int[Array, "*T"]:
    """Exact below num_buckets/2, logarithmic up to max_distance, then the last."""
    exact = num_buckets // 2
    n = jnp.maximum(distance, 0)
    ratio = jnp.log(jnp.maximum(n, 1).astype(jnp.float32) / exact) / math.log(max_distance / exact)
    coarse = exact + (ratio * (num_buckets - exact)).astype(jnp.int32)
    return jnp.where(n < exact, n, jnp.minimum(coarse, num_buckets - 1))


@register
@dataclasses.dataclass(frozen=True)
class T5(PositionEncoding):
    """score + table[head, bucket(i - j)] (Raffel et al. 2020, section 2.1), one for all layers.

    Attributes:
        num_buckets: even, at least 4; half of them hold one distance each.
        max_distance: distances from here on share the last bucket.
        bidirectional: the second half of the buckets is for keys after the query (T5's encoder);
            num_buckets is then a multiple of 4, at least 8.
    """

    num_buckets: int = 32
    max_distance: int = 128
    bidirectional: bool = False

    name: ClassVar[str] = "t5"

    @property
    def changes_scores(self):
        """Adds a bias."""
        return True

    @property
    def two_sided(self):
        """With buckets of both sides."""
        return self.bidirectional

    @property
    def one_side(self) -> int:
        """Buckets of keys up to the query."""
        return self.num_buckets // 2 if self.bidirectional else self.num_buckets

    def bind(self, dims: Dimensions) -> T5:
        """Checks the buckets."""
        n, sides = self.one_side, 2 if self.bidirectional else 1
        allowed = "a multiple of 4 >= 8" if self.bidirectional else "an even number >= 4"
        fine = n >= 4 and self.num_buckets % (2 * sides) == 0
        require(fine, "t5: num_buckets", self.num_buckets, allowed)
        far = self.max_distance
        require(n // 2 < far <= MAX_POSITION, "t5: max_distance", far, f"an integer > {n // 2}")
        return self

    def parameters(self, dims):
        """The table, zero at the start: the model begins as NoPE."""
        shape = (dims.num_heads, self.num_buckets)
        return {"table": Parameter(shape, jax.nn.initializers.zeros, ("heads", None))}

    def head_parameters(self, params, num_heads):
        """A row of the table for each head."""
        return params["table"].astype(jnp.float32)

    def bias(self, head, distance, q_positions):
        """table[bucket(distance)]."""
        if not self.bidirectional:
            return head[bucket(distance, self.num_buckets, self.max_distance)]
        near = bucket(jnp.abs(distance), self.one_side, self.max_distance)
        return head[near + jnp.where(distance < 0, self.one_side, 0)]

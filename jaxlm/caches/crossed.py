"""A decoder's cache beside the keys and values of what an encoder gave it."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
from jaxtyping import Array, Int

from jaxlm.caches.dense import DenseCache
from jaxlm.caches.stacks import reorder_rows
from jaxlm.model.config import ModelConfig
from jaxlm.model.cross_attention import Source


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CrossedCache:
    """What is kept from token to token.

    Attributes:
        own: of the decoder's tokens.
        source: keys and values of the encoder's output, made at the first call; None before it.
    """

    own: DenseCache
    source: Source | None = None

    axes: ClassVar = (None, None)  # each device has all of it

    @classmethod
    def init(cls, config: ModelConfig, batch: int, capacity: int) -> CrossedCache:
        """Empty, for `capacity` tokens of the decoder whose config this is.

        Raises:
            ValueError: capacity below 1.
        """
        return cls(DenseCache.init(config, batch, capacity))

    @property
    def appendable(self) -> None:
        """As the decoder's own."""

    def commit(
        self,
        kv: tuple[Array, ...],
        positions: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"],
    ) -> CrossedCache:
        """Writes T tokens of the decoder, see `DenseCache.commit`."""
        return dataclasses.replace(self, own=self.own.commit(kv, positions, segment_ids))

    def met(self, kv: tuple[Array, ...], segment_ids: Int[Array, "B S"]) -> CrossedCache:
        """With the keys and values of the encoder's output, which come behind the decoder's."""
        return dataclasses.replace(self, source=Source(segment_ids, None, *kv[2:]))

    def reorder(self, rows: Int[Array, "B"]) -> CrossedCache:
        """Row i becomes what row `rows[i]` was."""
        return reorder_rows(self, rows)

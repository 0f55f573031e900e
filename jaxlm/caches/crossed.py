"""A decoder's cache beside the keys and values of what an encoder gave it."""

from __future__ import annotations

import dataclasses

import jax
from jaxtyping import Array, Int

from jaxlm.caches.dense import DenseCache
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

    @classmethod
    def init(cls, config: ModelConfig, batch: int, capacity: int) -> CrossedCache:
        """Empty, for `capacity` tokens of the decoder whose config this is.

        Raises:
            ValueError: capacity below 1.
        """
        return cls(DenseCache.init(config, batch, capacity))

    def commit(
        self,
        kv: tuple[Array, ...],
        positions: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"],
        source: Source,
    ) -> CrossedCache:
        """Writes T tokens; `kv` is of every layer: keys, values, and those of `source`."""
        keys, values, source_keys, source_values = kv
        own = self.own.commit(keys, values, positions, segment_ids)
        if self.source is not None:
            return dataclasses.replace(self, own=own)
        return CrossedCache(own, Source(source.segment_ids, None, source_keys, source_values))

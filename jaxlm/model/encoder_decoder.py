"""An encoder and a decoder that attends to its output, as one pure function (T5).

hidden = model.apply({"params": params}, tokens, segment_ids, method="encode")
logits, cache = model.apply({"params": params}, targets, hidden, segment_ids, method="decode")
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxlm.caches.crossed import CrossedCache
from jaxlm.caches.rows import padding_last
from jaxlm.config import build, check, check_types
from jaxlm.model.config import ModelConfig, NumericsConfig
from jaxlm.model.cross_attention import Source
from jaxlm.model.transformer import Transformer


@dataclasses.dataclass(frozen=True)
class EncoderDecoderConfig:
    """Two Transformers that share one embedding.

    Attributes:
        encoder: usually of bidirectional layers; its own head does not exist.
        decoder: of crossed layers, and of the encoder's width, vocabulary and numerics.
        start_token: what the decoder is given before the first token (T5: padding's id).
    """

    encoder: ModelConfig
    decoder: ModelConfig
    start_token: int = 0

    PARTS = {"encoder": ModelConfig, "decoder": ModelConfig}

    def __post_init__(self):
        check_types(type(self), vars(self), "model")
        kinds, vocab = self.decoder.attention.layer_pattern, self.decoder.vocab_size
        check(
            "model.decoder",
            layer_pattern=(kinds, set(kinds) == {"crossed"}, "crossed"),
            d_model=self._as_encoder("d_model"),
            vocab_size=self._as_encoder("vocab_size"),
            numerics=self._as_encoder("numerics"),
        )
        kinds, tied = self.encoder.attention.layer_pattern, self.encoder.embedding.tied
        check(
            "model.encoder",
            layer_pattern=(kinds, "crossed" not in kinds, "global, sliding, bidirectional"),
            tied=(tied, tied, "True: an encoder has no head"),
        )
        known = 0 <= self.start_token < vocab
        check("model", start_token=(self.start_token, known, f"0 to {vocab - 1}"))

    def _as_encoder(self, name: str) -> tuple[Any, bool, str]:
        """A decoder field's test."""
        mine, theirs = getattr(self.decoder, name), getattr(self.encoder, name)
        return mine, mine == theirs, f"the encoder's {theirs}"

    @property
    def vocab_size(self) -> int:
        """Of both."""
        return self.encoder.vocab_size

    @property
    def numerics(self) -> NumericsConfig:
        """Of both."""
        return self.encoder.numerics

    def replace(self, **changes: Any) -> EncoderDecoderConfig:
        """A copy with other fields, validated anew."""
        return dataclasses.replace(self, **changes)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> EncoderDecoderConfig:
        """From a nested mapping.

        Raises:
            ValueError: an unknown field (the nearest name is told) or a value that is not allowed.
        """
        return build(cls, values, "model")

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able mapping that `from_dict` turns back into an equal config."""
        parts = {"encoder": self.encoder.to_dict(), "decoder": self.decoder.to_dict()}
        return {**parts, "start_token": self.start_token}


class EncoderDecoder(nn.Module):
    """The model. Methods are pure functions through `apply`; see `jaxlm.init_params`.

    Attributes:
        config: every choice.
    """

    config: EncoderDecoderConfig

    def setup(self):  # noqa: D102  Linen's own
        self.encoder = Transformer(self.config.encoder)
        self.decoder = Transformer(self.config.decoder, embedding_of=self.encoder)

    def __call__(
        self,
        tokens: Int[Array, "B S"],
        targets: Int[Array, "B T"],
        segment_ids: Int[Array, "B S"] | None = None,
    ) -> Float[Array, "B T V"]:
        """float32 logits of the token after each of `targets`, which begin with the start token.

        Args:
            tokens: the encoder's input.
            targets: the decoder's.
            segment_ids: of the encoder's input; 0 is padding. None: all 1.
        """
        return self.decode(targets, self.encode(tokens, segment_ids), segment_ids)[0]

    def encode(
        self,
        tokens: Int[Array, "B S"],
        segment_ids: Int[Array, "B S"] | None = None,
        positions: Int[Array, "B S"] | None = None,
    ) -> Float[Array, "B S D"]:
        """The encoder's output.

        Args:
            tokens: token ids.
            segment_ids: tokens see only their own segment; 0 is padding. None: all 1.
            positions: of each token in its document; None counts from 0.
        """
        segment_ids = jnp.ones_like(tokens) if segment_ids is None else segment_ids
        positions = _counted(tokens, 0) if positions is None else positions
        return self.encoder.hidden(tokens, positions, segment_ids)[0]

    def decode(
        self,
        tokens: Int[Array, "B T"],
        hidden: Float[Array, "B S D"] | None = None,
        encoder_segment_ids: Int[Array, "B S"] | None = None,
        cache: CrossedCache | None = None,
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T V"], CrossedCache | None]:
        """Logits of the next token at every token.

        Args:
            tokens: the decoder's, the start token first.
            hidden: what `encode` gave; None where the cache has met it.
            encoder_segment_ids: as `encode` was given; tokens see the segment of their number.
            cache: earlier tokens' keys and values, and those of `hidden`; the new ones are
                committed to it.
            positions: None counts on from the cache, or from 0.
            segment_ids: 0 is padding; None: all 1.

        Returns:
            float32 logits and the cache with these tokens (None without).

        Raises:
            ValueError: neither `hidden` nor a cache that has met it.
        """
        source = None if cache is None else cache.source
        if source is None:
            if hidden is None:
                raise ValueError("hidden=None; allowed: what `encode` gave, or a cache with it")
            there = jnp.ones(hidden.shape[:2], jnp.int32)
            source = Source(there if encoder_segment_ids is None else encoder_segment_ids, hidden)
        if positions is None:
            positions = _counted(tokens, 0 if cache is None else cache.own.lengths[:, None])
        segment_ids = jnp.ones_like(tokens) if segment_ids is None else segment_ids
        own = None if cache is None else cache.own
        x, kv = self.decoder.hidden(
            tokens, positions, segment_ids, own, return_kv=cache is not None, source=source
        )
        if cache is not None and kv is not None:
            cache = cache if cache.source is not None else cache.met(kv, source.segment_ids)
            cache = cache.commit(*padding_last(kv[:2], positions, segment_ids))
        return self.decoder.logits(x), cache

    def extend(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"],
        cache: CrossedCache,
        tree: Bool[Array, "B T T"] | None = None,
    ) -> tuple[Float[Array, "B T V"], tuple[Array, ...]]:
        """As of the decoder alone, with a cache that has met the encoder's output."""
        x, kv = self.decoder.hidden(
            tokens,
            positions,
            segment_ids,
            cache.own,
            return_kv=True,
            source=cache.source,
            tree=tree,
        )
        assert kv is not None
        return self.decoder.logits(x), kv[:2]


def _counted(tokens: Int[Array, "B T"], start: int | Int[Array, "B 1"]) -> Int[Array, "B T"]:
    """Positions from `start` on."""
    return jnp.broadcast_to(start + jnp.arange(tokens.shape[1])[None], tokens.shape)

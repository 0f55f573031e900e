"""Tokens that are favoured, banned or forced, whatever the text."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxlm.decoding.processors.batch import Batch
from jaxlm.decoding.processors.processor import Past


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MinNewTokens:
    """No stop token before so many tokens are drawn."""

    count: Int[Array, "B"]
    stops: Bool[Array, "B V"]

    settings: ClassVar[tuple[str, ...]] = ("min_new_tokens",)
    needs: ClassVar[frozenset[str]] = frozenset()

    @classmethod
    def make(cls, batch: Batch, min_new_tokens: Any) -> MinNewTokens | None:
        """0: off."""
        x = batch.numbers("min_new_tokens", min_new_tokens, 0, batch.max_new_tokens, np.int32)
        if not (x.any() and batch.stop_tokens):
            return None
        stops = batch.mask("stop_token_ids", list(batch.stop_tokens))
        return cls(jnp.asarray(x), jnp.asarray(stops))

    def __call__(self, logits: Float[Array, "B V"], past: Past) -> Float[Array, "B V"]:
        """Stop tokens become -inf while it is too early."""
        early = past.drawn < self.count
        return jnp.where(self.stops & early[:, None], -jnp.inf, logits)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LogitBias:
    """Adds to the logits of some tokens."""

    bias: Float[Array, "B V"]

    settings: ClassVar[tuple[str, ...]] = ("logit_bias",)
    needs: ClassVar[frozenset[str]] = frozenset()

    @classmethod
    def make(cls, batch: Batch, logit_bias: Any) -> LogitBias | None:
        """From {token id: what is added}; -inf bans."""
        bias = np.zeros((batch.rows, batch.vocab_size), np.float32)

        def is_one(value: Any) -> bool:
            return isinstance(value, Mapping)

        for row, given in enumerate(batch.each("logit_bias", logit_bias, is_one)):
            for token, added in (given or {}).items():
                batch.check_ids("logit_bias", [token])
                batch.check_bias(f"logit_bias[{token}]", added)
                bias[row, token] = added
        return cls(jnp.asarray(bias)) if bias.any() else None

    def __call__(self, logits: Float[Array, "B V"], past: Past) -> Float[Array, "B V"]:
        """Before the penalties."""
        return jnp.where(self.bias == 0, logits, logits + self.bias)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BannedTokens:
    """Tokens never drawn: those suppressed, and those outside of what is allowed."""

    banned: Bool[Array, "B V"]

    settings: ClassVar[tuple[str, ...]] = ("allowed_token_ids", "suppress_tokens")
    needs: ClassVar[frozenset[str]] = frozenset()

    @classmethod
    def make(
        cls, batch: Batch, allowed_token_ids: Any = None, suppress_tokens: Any = None
    ) -> BannedTokens | None:
        """None: off."""
        banned = np.zeros((batch.rows, batch.vocab_size), bool)
        if suppress_tokens is not None:
            banned |= batch.mask("suppress_tokens", suppress_tokens)
        if allowed_token_ids is not None:
            banned |= ~batch.mask("allowed_token_ids", allowed_token_ids, absent=True)
        return cls(jnp.asarray(banned)) if banned.any() else None

    def __call__(self, logits: Float[Array, "B V"], past: Past) -> Float[Array, "B V"]:
        """They become -inf."""
        return jnp.where(self.banned, -jnp.inf, logits)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BeginBan:
    """Tokens not drawn first, or next after a forced first one.

    Attributes:
        after_forced: rows whose first token is forced where their prompt is of one token.
    """

    banned: Bool[Array, "B V"]
    after_forced: Bool[Array, "B"]

    settings: ClassVar[tuple[str, ...]] = ("begin_suppress_tokens", "forced_bos_token_id")
    needs: ClassVar[frozenset[str]] = frozenset()

    @classmethod
    def make(
        cls, batch: Batch, begin_suppress_tokens: Any = None, forced_bos_token_id: Any = None
    ) -> BeginBan | None:
        """None: off."""
        if begin_suppress_tokens is None:
            return None
        banned = batch.mask("begin_suppress_tokens", begin_suppress_tokens)
        forced = batch.tokens("forced_bos_token_id", [None] * batch.rows)
        if forced_bos_token_id is not None:
            forced = batch.tokens("forced_bos_token_id", forced_bos_token_id)
        return cls(jnp.asarray(banned), jnp.asarray(forced >= 0))

    def __call__(self, logits: Float[Array, "B V"], past: Past) -> Float[Array, "B V"]:
        """They become -inf at that one place."""
        later = self.after_forced & (past.lengths - past.drawn == 1)
        now = past.drawn == later.astype(jnp.int32)
        return jnp.where(self.banned & now[:, None], -jnp.inf, logits)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ForcedTokens:
    """A token that must come second in a text, after a start token alone (the language of a
    translation), and one that must come last.

    Attributes:
        bos, eos: -1: none.
        last: tokens drawn before the last one.
    """

    bos: Int[Array, "B"]
    eos: Int[Array, "B"]
    last: Int[Array, "B"]

    settings: ClassVar[tuple[str, ...]] = ("forced_bos_token_id", "forced_eos_token_id")
    needs: ClassVar[frozenset[str]] = frozenset()

    @classmethod
    def make(
        cls, batch: Batch, forced_bos_token_id: Any = None, forced_eos_token_id: Any = None
    ) -> ForcedTokens | None:
        """None: off."""
        given = {"forced_bos_token_id": forced_bos_token_id} | {
            "forced_eos_token_id": forced_eos_token_id
        }
        none = [None] * batch.rows
        bos, eos = (batch.tokens(k, none if v is None else v) for k, v in given.items())
        last = np.full(batch.rows, batch.max_new_tokens - 1, np.int32)
        if (bos < 0).all() and (eos < 0).all():
            return None
        return cls(jnp.asarray(bos), jnp.asarray(eos), jnp.asarray(last))

    def __call__(self, logits: Float[Array, "B V"], past: Past) -> Float[Array, "B V"]:
        """All others become -inf, it 0, whatever it was."""
        forced = jnp.where(past.lengths == 1, self.bos, -1)
        ends = (past.drawn == self.last) & (self.eos >= 0)
        forced = jnp.where(ends, self.eos, forced)[:, None]
        here = jnp.arange(logits.shape[1])[None] == forced
        return jnp.where(forced < 0, logits, jnp.where(here, 0.0, -jnp.inf))

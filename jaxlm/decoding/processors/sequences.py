"""Sequences of tokens that are favoured, or must not be said: their last token is."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxlm.decoding.processors.batch import Batch, is_id, is_list
from jaxlm.decoding.processors.processor import NOWHERE, Past


def _size(longest: int) -> int:
    """The next power of two, so that few programs serve all lists."""
    return 1 << max(longest - 1, 0).bit_length()


def _right_aligned(rows: Sequence[Sequence[Sequence[int]]]) -> Int[np.ndarray, "B W N"]:
    """Sequences of each row; in front of one, and in place of one, `NOWHERE`."""
    count = _size(max(map(len, rows)))
    length = _size(max(len(w) for words in rows for w in words))
    found = np.full((len(rows), count, length), NOWHERE, np.int32)
    for row, words in enumerate(rows):
        for i, word in enumerate(words):
            found[row, i, length - len(word) :] = word
    return found


def _begun(words: Int[Array, "B W N"], past: Past) -> Bool[Array, "B W"]:
    """Whether prompt and output end with all of a sequence but its last token."""
    tokens, before = past.tokens, words.shape[2] - 1
    assert tokens is not None
    at = past.lengths[:, None] - before + jnp.arange(before)[None]
    end = jnp.where(at >= 0, jnp.take_along_axis(tokens, jnp.maximum(at, 0), 1), -1)
    beginning = words[:, :, :-1]
    return ((beginning == end[:, None]) | (beginning == NOWHERE)).all(-1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SequenceBias:
    """Adds to the logit of the last token of each sequence whose others the text ends with."""

    words: Int[Array, "B W N"]
    bias: Float[Array, "B W"]

    settings: ClassVar[tuple[str, ...]] = ("sequence_bias",)
    needs: ClassVar[frozenset[str]] = frozenset({"tokens"})

    @classmethod
    def make(cls, batch: Batch, sequence_bias: Any) -> SequenceBias | None:
        """From {tuple of token ids: what is added}; -inf bans."""

        def is_one(value: Any) -> bool:
            return isinstance(value, Mapping)

        given = [row or {} for row in batch.each("sequence_bias", sequence_bias, is_one)]
        if not any(given):
            return None
        words = _right_aligned([[batch.check_ids("sequence_bias", w) for w in r] for r in given])
        bias = np.zeros(words.shape[:2], np.float32)
        for row, biases in enumerate(given):
            for i, (word, added) in enumerate(biases.items()):
                batch.check_bias(f"sequence_bias[{word}]", added)
                bias[row, i] = added
        return cls(jnp.asarray(words), jnp.asarray(bias))

    def __call__(self, logits: Float[Array, "B V"], past: Past) -> Float[Array, "B V"]:
        """Sequences with one last token add up."""
        rows = jnp.arange(logits.shape[0])[:, None]
        added = jnp.where(_begun(self.words, past), self.bias, 0.0)
        return logits.at[rows, self.words[:, :, -1]].add(added, mode="drop")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BadWords:
    """Bans the last token of each word whose others are what the text ends with."""

    words: Int[Array, "B W N"]

    settings: ClassVar[tuple[str, ...]] = ("bad_words_ids",)
    needs: ClassVar[frozenset[str]] = frozenset({"tokens"})

    @classmethod
    def make(cls, batch: Batch, bad_words_ids: Any) -> BadWords | None:
        """From lists of ids; a stop token alone is no word, as with Hugging Face."""

        def is_one(value: Any) -> bool:
            return is_list(value) and all(is_list(w) and all(map(is_id, w)) for w in value)

        stops, rows = [[i] for i in batch.stop_tokens], []
        for words in batch.each("bad_words_ids", bad_words_ids, is_one):
            checked = [batch.check_ids("bad_words_ids", w) for w in words or ()]
            rows.append([w for w in checked if w not in stops])
        return cls(jnp.asarray(_right_aligned(rows))) if any(rows) else None

    def __call__(self, logits: Float[Array, "B V"], past: Past) -> Float[Array, "B V"]:
        """Whether the prompt or the output has the word's beginning."""
        rows = jnp.arange(logits.shape[0])[:, None]
        ban = jnp.where(_begun(self.words, past), -jnp.inf, jnp.inf)
        return logits.at[rows, self.words[:, :, -1]].min(ban, mode="drop")

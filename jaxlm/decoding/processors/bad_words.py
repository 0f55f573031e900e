"""Sequences of tokens that must not be said."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxlm.decoding.processors.batch import Batch, is_id, is_list
from jaxlm.decoding.processors.processor import NOWHERE, Past


def _size(longest: int) -> int:
    """The next power of two, so that few programs serve all lists."""
    return 1 << max(longest - 1, 0).bit_length()


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BadWords:
    """Bans the last token of each word whose others are what the text ends with.

    Attributes:
        words: right-aligned; in front of a word, and in place of one, `NOWHERE`.
    """

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
        if not any(rows):
            return None
        count = _size(max(map(len, rows)))
        length = _size(max(len(w) for words in rows for w in words))
        found = np.full((batch.rows, count, length), NOWHERE, np.int32)
        for row, words in enumerate(rows):
            for i, word in enumerate(words):
                found[row, i, length - len(word) :] = word
        return cls(jnp.asarray(found))

    def __call__(self, logits: Float[Array, "B V"], past: Past) -> Float[Array, "B V"]:
        """Whether the prompt or the output has the word's beginning."""
        tokens, before = past.tokens, self.words.shape[2] - 1
        assert tokens is not None
        at = past.lengths[:, None] - before + jnp.arange(before)[None]
        end = jnp.where(at >= 0, jnp.take_along_axis(tokens, jnp.maximum(at, 0), 1), -1)
        begun = self.words[:, :, :-1]
        said = ((begun == end[:, None]) | (begun == NOWHERE)).all(-1)
        rows = jnp.arange(logits.shape[0])[:, None]
        ban = jnp.where(said, -jnp.inf, jnp.inf)
        return logits.at[rows, self.words[:, :, -1]].min(ban, mode="drop")

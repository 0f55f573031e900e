"""How hard a group of beams is pushed away from what a group before it has said.

Diverse beam search (Vijayakumar et al., arXiv 1610.02424, section 3). Each function takes the
earlier group's texts, the token of this step included; those of this group, which have `length`
tokens; and gives a penalty for each token that may be next.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def hamming(
    earlier: Int[Array, "N W M"], own: Int[Array, "N W M"], length: Int[Array, ""], vocab: int
) -> Float[Array, "N W V"]:
    """How many of the earlier group's texts have said the token at this step."""
    said = _newest(earlier, length, vocab).sum(1, keepdims=True)
    return jnp.broadcast_to(said, (*own.shape[:2], vocab))


def cumulative(
    earlier: Int[Array, "N W M"], own: Int[Array, "N W M"], length: Int[Array, ""], vocab: int
) -> Float[Array, "N W V"]:
    """exp(−mismatches/Γ) over all steps and all pairs of texts, Γ = W: it fades where they differ
    already.
    """
    W, M = own.shape[1:]
    past = (jnp.arange(M) < length)[None, None, None]
    unlike = ((earlier[:, None] != own[:, :, None]) & past).sum((2, 3))
    now = W - _newest(earlier, length, vocab).sum(1, keepdims=True)
    return jnp.exp(-(unlike[..., None].astype(jnp.float32) + now) / W)


def bigrams(
    earlier: Int[Array, "N W M"], own: Int[Array, "N W M"], length: Int[Array, ""], vocab: int
) -> Float[Array, "N W V"]:
    """How often the earlier group has said the token behind a text's last one; a first token has
    none before it.
    """
    (N, W, M), V = own.shape, vocab
    last = own[:, :, jnp.maximum(length - 1, 0)]
    first, second = earlier[..., :-1], earlier[..., 1:]
    said = (jnp.arange(M - 1) < length)[None, None, None]
    found = (first[:, None] == last[:, :, None, None]) & said
    row, text = jnp.arange(N)[:, None, None, None], jnp.arange(W)[None, :, None, None]
    return jnp.zeros((N, W, V)).at[row, text, second[:, None]].add(found.astype(jnp.float32))


def _newest(earlier: Array, length: Array, vocab: int) -> Float[Array, "N W V"]:
    return jax.nn.one_hot(earlier[:, :, length], vocab)


DIVERSITY = {"hamming": hamming, "cumulative": cumulative, "ngram": bigrams}

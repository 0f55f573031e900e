"""How long each token's own document is, among others packed into its row."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int


def document_lengths(
    positions: Int[Array, "B T"], segment_ids: Int[Array, "B T"]
) -> Int[Array, "B T"]:
    """For each token, the largest position of its segment in the row, plus one, in tokens.

    O(T·log T). As in attention, a segment is all tokens of a row with one id, whatever the ids and
    wherever they stand.
    """

    def row(at: Array, ids: Array) -> Array:
        # Sorted by segment, then position: each segment ends with its largest position.
        ids_sorted, at_sorted = jax.lax.sort((ids, at), num_keys=2)
        return at_sorted[jnp.searchsorted(ids_sorted, ids, side="right") - 1] + 1

    return jax.vmap(row)(positions, segment_ids)

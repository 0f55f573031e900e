"""A draft: tokens that may come next, as a tree below the last token that is sure."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Draft:
    """Nodes of one tree a row; node 0, the root, is the row's last token.

    Attributes:
        tokens: of the nodes.
        parents: of each node, an earlier one; of the root -1.
        valid: nodes that are there.
        depth: most edges from the root to a node. Static.
    """

    tokens: Int[Array, "B T"]
    parents: Int[Array, "B T"]
    valid: Bool[Array, "B T"]
    depth: int = dataclasses.field(metadata={"static": True})


def root_alone(tokens: Int[Array, "B"]) -> Draft:
    """Plain decoding: nothing is guessed."""
    tokens = tokens[:, None]
    return Draft(tokens, jnp.full_like(tokens, -1), jnp.ones_like(tokens, bool), depth=0)


def ancestors(draft: Draft) -> tuple[Int[Array, "B T"], Bool[Array, "B T T"]]:
    """Each node's depth, and which nodes are on its way from the root, itself too."""
    T = draft.tokens.shape[1]
    up = jnp.maximum(draft.parents, 0)
    way = jnp.broadcast_to(jnp.eye(T, dtype=bool)[None], (*up.shape, T))
    for _ in range(draft.depth):
        way |= jnp.take_along_axis(way, up[:, :, None], 1)
    return way.sum(-1, dtype=jnp.int32) - 1, way

"""Which part of a draft is what the model would have said."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Int

from jaxlm.decoding.tree import Draft


class Accepted(NamedTuple):
    """The way down from the root.

    Attributes:
        path: nodes, the root first; what comes after `length` of them means nothing.
        length: nodes of the path, 1 or more.
        token: what the model says after the last of them.
    """

    path: Int[Array, "B D"]
    length: Int[Array, "B"]
    token: Int[Array, "B"]


def accept(choices: Int[Array, "B T"], draft: Draft) -> Accepted:
    """From the root down to the child that holds what the model chose, as long as there is one.

    The tokens are those of plain decoding: what was chosen at a node is a function of the tokens on
    the way to it, and of the row's seed and the position where it is a draw. So the draft decides
    how many tokens come at once, and never which.

    Args:
        choices: the model's token after each node.
        draft: with D - 1 = `draft.depth`.
    """
    node = jnp.zeros(choices.shape[0], jnp.int32)
    token, going = choices[:, 0], jnp.ones(choices.shape[0], bool)
    path, length = [node], jnp.ones(choices.shape[0], jnp.int32)
    for _ in range(draft.depth):
        child = (draft.parents == node[:, None]) & (draft.tokens == token[:, None]) & draft.valid
        going &= child.any(1)
        node = jnp.where(going, jnp.argmax(child, 1).astype(jnp.int32), node)
        token = jnp.take_along_axis(choices, node[:, None], 1)[:, 0]
        path.append(node)
        length += going.astype(jnp.int32)
    return Accepted(jnp.stack(path, 1), length, token)

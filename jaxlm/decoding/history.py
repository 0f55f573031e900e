"""What the loop keeps of a text for its processors: as much as one of them reads."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from jaxlm.caches.rows import write_rows
from jaxlm.decoding.processors.processor import NOWHERE, Past
from jaxlm.decoding.tree import Draft


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class History:
    """Arrays that no processor reads are None.

    Attributes:
        tokens: prompt and drawn, with room for what is drawn yet.
        prompt: which tokens are in the prompt.
        counts: how often each was drawn.
    """

    tokens: Int[Array, "B L"] | None
    prompt: Bool[Array, "B V"] | None
    counts: Int[Array, "B V"] | None

    @classmethod
    def begin(
        cls,
        needs: frozenset[str],
        prompt: tuple[Int[Array, "B T"], Int[Array, "B"]],
        vocab_size: int,
        room: int,
    ) -> History:
        """Of prompts = (tokens, true lengths), padded behind.

        Args:
            needs: of "tokens", "prompt" and "counts".
            room: tokens that may be written behind the prompts.
        """
        tokens, lengths = prompt
        B, T = tokens.shape
        row = jnp.arange(B)[:, None]
        real = jnp.where(jnp.arange(T)[None] < lengths[:, None], tokens, NOWHERE)
        there = jnp.zeros((B, vocab_size), bool)
        return cls(
            jnp.pad(tokens, ((0, 0), (0, room))) if "tokens" in needs else None,
            there.at[row, real].set(True, mode="drop") if "prompt" in needs else None,
            jnp.zeros((B, vocab_size), jnp.int32) if "counts" in needs else None,
        )

    def write(
        self, new: Int[Array, "B D"], kept: Bool[Array, "B D"], lengths: Int[Array, "B"]
    ) -> History:
        """With those of the new tokens that are kept, the first of a row, behind its `lengths`."""
        tokens, counts = self.tokens, self.counts
        if tokens is not None:
            tokens = write_rows(tokens, jnp.where(kept, new, 0), lengths)
        if counts is not None:
            row = jnp.arange(new.shape[0])[:, None]
            counts = counts.at[row, jnp.where(kept, new, NOWHERE)].add(1, mode="drop")
        return dataclasses.replace(self, tokens=tokens, counts=counts)

    def past(self, drawn: Int[Array, "B"], lengths: Int[Array, "B"]) -> Past:
        """What lies behind each row."""
        return Past(drawn, lengths, self.tokens, self.prompt, self.counts)

    def past_of_nodes(
        self,
        drawn: Int[Array, "B"],
        lengths: Int[Array, "B"],
        draft: Draft,
        depths: Int[Array, "B T"],
        way: Bool[Array, "B T T"],
    ) -> Past:
        """What lies behind each node of a draft, B·T of them.

        Args:
            drawn, lengths: up to the root.
            depths, way: see `jaxlm.decoding.tree.ancestors`.
        """
        if draft.depth == 0:
            return self.past(drawn, lengths)
        T = depths.shape[1]
        below = jnp.arange(1, draft.depth + 1)[None, None]
        on = way[:, :, :, None] & (depths[:, :, None] == below)[:, None]
        path = jnp.where(on, draft.tokens[:, None, :, None], 0).sum(2, dtype=jnp.int32)
        path = jnp.where(below <= depths[:, :, None], path, NOWHERE).reshape(-1, draft.depth)
        own, end = jax.tree.map(lambda a: jnp.repeat(a, T, 0), (self, lengths))
        tokens = own.tokens
        if tokens is not None:
            at = end[:, None] + jnp.arange(draft.depth)[None]
            tokens = tokens.at[jnp.arange(len(end))[:, None], at].set(path)
        depth = depths.reshape(-1)
        drawn = jnp.repeat(drawn, T, 0) + depth
        return Past(drawn, end + depth, tokens, own.prompt, own.counts, path)

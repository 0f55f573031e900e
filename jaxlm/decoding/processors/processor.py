"""What a processor is to the loop."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Protocol, runtime_checkable

import jax
from jaxtyping import Array, Bool, Float, Int

# A token that is none: where one is written to, it is left out.
NOWHERE = 2**31 - 1


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Past:
    """What rows, or nodes of a draft, have behind them. An array that no processor needs is None.

    Attributes:
        drawn: tokens so far without the prompt.
        lengths: with it.
        tokens: prompt and drawn; what comes after `lengths` of them means nothing.
        prompt: which tokens are in the prompt.
        counts: how often each was drawn up to the draft's root.
        path: tokens from below the root to the node, `NOWHERE` behind them; None: the root alone.
    """

    drawn: Int[Array, "B"]
    lengths: Int[Array, "B"]
    tokens: Int[Array, "B L"] | None = None
    prompt: Bool[Array, "B V"] | None = None
    counts: Int[Array, "B V"] | None = None
    path: Int[Array, "B D"] | None = None


@runtime_checkable
class Processor(Protocol):
    """A pytree of arrays whose first axis is rows: rows of other settings share a program.

    Attributes:
        needs: which of `Past`'s arrays it reads, of "tokens", "prompt" and "counts".
    """

    needs: ClassVar[frozenset[str]]

    def __call__(self, logits: Float[Array, "B V"], past: Past) -> Float[Array, "B V"]:
        """The logits that count; a row whose setting is off is left as it is, bit for bit."""
        ...

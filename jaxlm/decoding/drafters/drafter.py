"""What a drafter is to the loop."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from jaxtyping import Array, Int

from jaxlm.decoding.tree import Draft


@runtime_checkable
class Drafter(Protocol):
    """Hashable: its settings are static."""

    @property
    def depth(self) -> int:
        """Most tokens that one step may add beside the model's own."""
        ...

    def propose(self, last: Int[Array, "B"], lengths: Int[Array, "B"]) -> Draft:
        """Guesses of what comes after each row's last token, the one before position `lengths`."""
        ...

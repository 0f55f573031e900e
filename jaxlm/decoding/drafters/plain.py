"""No guess: one token a step."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from jaxtyping import Array, Int

from jaxlm.decoding.tree import Draft, root_alone


@dataclasses.dataclass(frozen=True)
class Plain:
    """Plain decoding."""

    depth: ClassVar[int] = 0

    def propose(self, last: Int[Array, "B"], lengths: Int[Array, "B"]) -> Draft:
        """The root alone."""
        return root_alone(last)


PLAIN = Plain()

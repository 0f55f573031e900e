"""Another encoding in the layers that slide than in those that see everything."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from jaxlm.positions.encoding import Dimensions, PositionEncoding, require
from jaxlm.positions.registry import register
from jaxlm.positions.rope import RoPE


@register
@dataclasses.dataclass(frozen=True)
class ByKind(PositionEncoding):
    """An encoding for each kind of layer (Gemma 3: RoPE of two bases; Cohere 2: none in global
    layers).

    What is added to the embeddings, and learned parameters, are those of `full`.

    Attributes:
        full: of "global" layers.
        sliding: of "sliding" ones; one that adds nothing to the embeddings and learns nothing.
    """

    full: PositionEncoding = RoPE()
    sliding: PositionEncoding = RoPE()

    name: ClassVar[str] = "by_kind"
    relative: ClassVar[bool] = False  # it is no one function of the distance: its parts may be

    @property
    def kinds(self):
        """Both."""
        return ("global", "sliding")

    @property
    def max_length(self):
        """That of global layers: an encoding without parameters has none."""
        return self.full.max_length

    def of_kind(self, kind):
        """That kind's."""
        return self.sliding if kind == "sliding" else self.full

    def bind(self, dims: Dimensions) -> ByKind:
        """Binds both."""
        for name, part in (("full", self.full), ("sliding", self.sliding)):
            nested = isinstance(part, ByKind)
            require(not nested, f"by_kind: {name}", str(part), "an encoding of one kind of layer")
        full, sliding = self.full.bind(dims), self.sliding.bind(dims)
        embeds = type(sliding).embed is not PositionEncoding.embed
        require(
            not embeds and not sliding.parameters(dims),
            "by_kind: sliding",
            str(sliding),
            "an encoding without learned parameters that adds nothing to the embeddings",
        )
        return dataclasses.replace(self, full=full, sliding=sliding)

    def parameters(self, dims):
        """Those of global layers."""
        return self.full.parameters(dims)

    def embed(self, params, x, positions):
        """As the encoding of global layers does."""
        return self.full.embed(params, x, positions)

"""No position encoding: order is visible through the causal mask alone."""

import dataclasses
from typing import ClassVar

from jaxlm.positions.encoding import PositionEncoding
from jaxlm.positions.registry import register


@register
@dataclasses.dataclass(frozen=True)
class NoPE(PositionEncoding):
    """Nothing is added anywhere (Kazemnejad et al. 2023, arXiv 2305.19466)."""

    name: ClassVar[str] = "nope"

    @property
    def two_sided(self):
        """Nothing to tell, on either side."""
        return True

"""Everything but the last tokens and the first few in so many bits: a staircase of one step."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from jaxlm.attention.mask import AttentionMask
from jaxlm.caches.kind import CACHES, CacheKind
from jaxlm.caches.staircase import Staircase, StaircaseCache, check_full
from jaxlm.config import check, integer_at_least, one_of
from jaxlm.model.config import ModelConfig
from kernels.kv_quantize.layout import BITS


@CACHES.register
@dataclasses.dataclass(frozen=True)
class Quantized(CacheKind):
    """KIVI's layout (arXiv 2402.02750); the fields are those of `Staircase`."""

    bits: int = 8
    full: int = 128
    group: int = 32
    num_sinks: int = 4
    window: int | None = None

    name: ClassVar[str] = "quantized"

    def __post_init__(self):
        check(self.name, bits=one_of(self.bits, *BITS))
        check_full(self.name, self.group, self.num_sinks, full=self.full)
        if self.window is not None:
            check(self.name, window=integer_at_least(self.window, self.full + 2))

    @property
    def staircase(self) -> Staircase:
        """The same."""
        steps = ((self.bits, None),)
        return Staircase(self.full, steps, self.group, self.num_sinks, self.window)

    @property
    def mask(self) -> AttentionMask | None:
        """A Λ, where there is a window."""
        return self.staircase.mask

    def init(self, config: ModelConfig, batch: int, capacity: int) -> StaircaseCache:
        """As a staircase's."""
        return self.staircase.init(config, batch, capacity)

"""Choices of an adapter."""

from __future__ import annotations

import dataclasses
import math
import re

from jaxlm.config import check, check_types


@dataclasses.dataclass(frozen=True)
class AdapterConfig:
    """A low-rank adapter of a frozen model: LoRA, or DoRA.

    Attributes:
        rank: of the product that is added to each matrix; None: no adapter, all of the model is
            trained.
        alpha: the product is multiplied by alpha / rank.
        targets: a pattern (re.fullmatch) of the projections that get one, within their layer:
            "attention/(q|v)"; those of a model are attention/{q,k,v,out}, feed_forward/{up,gate,
            down}, and with experts experts/{router,shared/…} (the routed experts have none).
        dora: learn each output's length apart from its direction.
    """

    rank: int | None = None
    alpha: float = 16.0
    targets: str = "attention/.*|feed_forward/.*"
    dora: bool = False

    def __post_init__(self):
        check_types(type(self), vars(self), "adapter")
        check(
            "adapter",
            rank=(self.rank, self.rank is None or self.rank >= 1, "None or an integer >= 1"),
            alpha=(self.alpha, 0 < self.alpha < math.inf, "a finite number > 0"),
            targets=(self.targets, _is_pattern(self.targets), "a regular expression"),
        )

    @property
    def scale(self) -> float:
        """Of the product."""
        assert self.rank is not None
        return self.alpha / self.rank


def _is_pattern(text: str) -> bool:
    try:
        re.compile(text)
    except re.error:
        return False
    return True

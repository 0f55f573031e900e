"""Which cached keys a row of queries sees and what their scores become: by position and a bias."""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

LOG2_E = 1.4426950408889634  # exp(x) = exp2(x·LOG2_E), and TPUs have an exp2
EMPTY = 2**31 - 1  # position of a slot that no query sees


class Queries(NamedTuple):
    """What a call knows of its queries, beside themselves.

    Attributes:
        positions: int [B, T]; below 0 for a query that sees nothing.
        segment_ids: int [B, T], or None; given if those of the slots are.
    """

    positions: jax.Array
    segment_ids: jax.Array | None = None


class Slots(NamedTuple):
    """What a call knows of a cache's slots, beside keys and values.

    Attributes:
        positions: int [B, S] of the token in each slot, in any order; -1 where a slot is empty.
        segment_ids: int [B, S], or None: a query sees slots of its own segment, and none of 0.
        lengths: int [B], slots in use; blocks past it are not fetched. None: all, and if no slots
            of a call have lengths the grid is static, so that the compiler can state its cost.
        bias: float32 [B, N, T, S], added to the capped scores, or None. It is read like keys and
            values, so it must not be larger than both: 4·N·T bytes a slot.
    """

    positions: jax.Array
    segment_ids: jax.Array | None = None
    lengths: jax.Array | None = None
    bias: jax.Array | None = None


@dataclasses.dataclass(frozen=True)
class Scoring:
    """The static description of a call.

    A query sees a slot if the slot's position is not above its own, not -1, the slot lies below
    the length, segments are equal and not 0, and the position is one of the last `window` (None:
    any) or below `num_sinks`.

    Attributes:
        scale: multiplies q·k.
        softcap: scores become softcap·tanh(scores / softcap), before a bias; None: they don't.
        window, num_sinks: see above.

    Raises:
        ValueError: a number that makes no sense, or sinks without a window.
    """

    scale: float
    softcap: float | None = None
    window: int | None = None
    num_sinks: int = 0

    def __post_init__(self) -> None:
        if not math.isfinite(self.scale):
            raise ValueError(f"scale={self.scale}; allowed: a finite number")
        if self.softcap is not None and not 0 < self.softcap < math.inf:
            raise ValueError(f"softcap={self.softcap}; allowed: None or a finite number > 0")
        if self.window is not None and not _is_integer(self.window, 1):
            raise ValueError(f"window={self.window}; allowed: None or an integer from 1 to {EMPTY}")
        if not _is_integer(self.num_sinks, 0):
            raise ValueError(f"num_sinks={self.num_sinks}; allowed: an integer from 0 to {EMPTY}")
        if self.num_sinks and self.window is None:
            raise ValueError(f"num_sinks={self.num_sinks}; allowed: 0 where there is no window")

    def __call__(
        self, dots: jax.Array, rows: jax.Array, keys: jax.Array, bias: jax.Array | None
    ) -> jax.Array:
        """Scores in base 2: exp2 of them is exp of the scores; -inf where a key is hidden.

        Args:
            dots: q·k, float32 [R, W].
            rows: int32 [R, 1 or 2]: position and, with segments, segment of each row's query.
            keys: int32 [1 or 2, W]: position and, with segments, segment of each key.
            bias: float32 [R, W], or None.
        """
        q, k = rows[:, :1], keys[:1]
        distance = q - k
        seen = distance >= 0
        if self.window is not None:
            near = distance < self.window
            seen &= (near | (k < self.num_sinks)) if self.num_sinks else near
        if rows.shape[1] == 2:
            seen &= rows[:, 1:] == keys[1:]
        if self.softcap is None:
            scores = dots * (self.scale * LOG2_E)
        else:
            scores = (self.softcap * LOG2_E) * jnp.tanh(dots * (self.scale / self.softcap))
        if bias is not None:
            scores += bias * LOG2_E
        return jnp.where(seen, scores, -jnp.inf)


def _is_integer(value: float, least: int) -> bool:
    """Of those that positions are compared with: int32."""
    return least <= value <= EMPTY and value == int(value)

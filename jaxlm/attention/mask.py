"""Which keys a query may see: a union of intervals of key positions, never a [T, S] array.

A mask is static and hashable, so that it can be an argument of `jit` and so that a kernel can skip
a hidden tile by arithmetic. It speaks of *positions*, not of slots: packing, left padding, ring
caches and context shards then need no special case.

    causal() | nothing else        every earlier token
    sliding_window(256)            the last 256 tokens, the token itself included
    lambda_shaped(256, 4)          the last 256 tokens and the first 4: LM-Infinite
    causal() & chunked(128)        every earlier token of the same chunk of 128
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


def _tighter(a: int | None, b: int | None) -> int | None:
    """The smaller of two upper bounds, where None is no bound."""
    if a is None or b is None:
        return b if a is None else a
    return min(a, b)


@dataclasses.dataclass(frozen=True)
class Interval:
    """The key positions j that a query at position i sees: all of these bounds at once.

    Attributes:
        ahead: j - i <= ahead; 0 is causal, None sees the whole future.
        window: i - j < window.
        below: j < below.
        chunk: i // chunk == j // chunk.
    """

    ahead: int | None = 0
    window: int | None = None
    below: int | None = None
    chunk: int | None = None

    def __post_init__(self):
        for name, low in (("ahead", 0), ("window", 1), ("below", 0), ("chunk", 1)):
            value = getattr(self, name)
            if value is not None and value < low:
                raise ValueError(f"Interval: {name}={value}; allowed: None or an integer >= {low}")

    def __and__(self, other: Interval) -> Interval:
        chunk = _tighter(self.chunk, other.chunk)
        if (
            self.chunk
            and other.chunk
            and max(self.chunk, other.chunk) % min(self.chunk, other.chunk)
        ):
            raise ValueError(
                f"chunk={self.chunk} & chunk={other.chunk}; allowed: one must divide the other"
            )
        return Interval(
            ahead=_tighter(self.ahead, other.ahead),
            window=_tighter(self.window, other.window),
            below=_tighter(self.below, other.below),
            chunk=chunk,
        )

    def inside(self, other: Interval) -> bool:
        """Whether `other` sees all that this one sees."""

        def tighter(a: int | None, b: int | None) -> bool:
            return b is None or (a is not None and a <= b)

        chunks = other.chunk is None or (self.chunk is not None and not other.chunk % self.chunk)
        return (
            tighter(self.ahead, other.ahead)
            and tighter(self.window, other.window)
            and tighter(self.below, other.below)
            and chunks
        )

    def visible(self, i: Any, j: Any) -> Any:
        """Boolean array of the broadcast shape of query positions `i` and key positions `j`."""
        seen = jnp.ones(jnp.broadcast_shapes(jnp.shape(i), jnp.shape(j)), bool)
        if self.ahead is not None:
            seen &= j - i <= self.ahead
        if self.window is not None:
            seen &= i - j < self.window
        if self.below is not None:
            seen &= j < self.below
        if self.chunk is not None:
            seen &= i // self.chunk == j // self.chunk
        return seen

    def touches(self, i_min: Any, i_max: Any, j_min: Any, j_max: Any) -> Any:
        """False only if no pair of the tile [i_min, i_max] × [j_min, j_max] is visible.

        Works on Python integers (then the answer is static) and on traced scalars alike.
        """
        seen: Any = True
        if self.ahead is not None:
            seen = seen & (j_min - i_max <= self.ahead)
        if self.window is not None:
            seen = seen & (i_min - j_max < self.window)
        if self.below is not None:
            seen = seen & (j_min < self.below)
        if self.chunk is not None:
            seen = seen & (j_min // self.chunk <= i_max // self.chunk)
            seen = seen & (i_min // self.chunk <= j_max // self.chunk)
        return seen

    def covers(self, i_min: Any, i_max: Any, j_min: Any, j_max: Any) -> Any:
        """True only if every pair of the tile is visible: its elements need no test."""
        full: Any = True
        if self.ahead is not None:
            full = full & (j_max - i_min <= self.ahead)
        if self.window is not None:
            full = full & (i_max - j_min < self.window)
        if self.below is not None:
            full = full & (j_max < self.below)
        if self.chunk is not None:
            first = i_min // self.chunk
            full = full & (first == i_max // self.chunk)
            full = full & (first == j_min // self.chunk) & (first == j_max // self.chunk)
        return full


@dataclasses.dataclass(frozen=True)
class AttentionMask:
    """A union of intervals. `a & b` sees what both see, `a | b` what either sees."""

    intervals: tuple[Interval, ...]

    def __post_init__(self):
        if not self.intervals:
            raise ValueError("AttentionMask: intervals=(); allowed: at least one Interval")

    def __and__(self, other: AttentionMask) -> AttentionMask:
        both = dict.fromkeys(a & b for a in self.intervals for b in other.intervals)
        return AttentionMask(tuple(a for a in both if not any(a.inside(b) for b in both if b != a)))

    def __or__(self, other: AttentionMask) -> AttentionMask:
        return AttentionMask(tuple(dict.fromkeys(self.intervals + other.intervals)))

    def visible(self, i: Any, j: Any) -> Any:
        """Boolean array of the broadcast shape of query positions `i` and key positions `j`."""
        seen = self.intervals[0].visible(i, j)
        for interval in self.intervals[1:]:
            seen |= interval.visible(i, j)
        return seen

    def touches(self, i_min: Any, i_max: Any, j_min: Any, j_max: Any) -> Any:
        """False only if no pair of the tile is visible."""
        seen: Any = False
        for interval in self.intervals:
            seen = seen | interval.touches(i_min, i_max, j_min, j_max)
        return seen

    def covers(self, i_min: Any, i_max: Any, j_min: Any, j_max: Any) -> Any:
        """True only if every pair of the tile is visible through one interval."""
        full: Any = False
        for interval in self.intervals:
            full = full | interval.covers(i_min, i_max, j_min, j_max)
        return full

    def to_dense(
        self, q_positions: Int[Array, "*B T"], k_positions: Int[Array, "*B S"]
    ) -> Bool[Array, "*B T S"]:
        """The mask as an array: for tests and for the reference form only."""
        return self.visible(q_positions[..., :, None], k_positions[..., None, :])


def full() -> AttentionMask:
    """Every key, past and future."""
    return AttentionMask((Interval(ahead=None),))


def causal() -> AttentionMask:
    """Keys at or before the query."""
    return AttentionMask((Interval(),))


def sliding_window(window: int) -> AttentionMask:
    """The last `window` keys, the query's own included: 0 <= i - j < window."""
    return AttentionMask((Interval(window=window),))


def kept_sinks(num_sinks: int) -> AttentionMask:
    """The first `num_sinks` keys, as far as they are not in the future."""
    return AttentionMask((Interval(below=num_sinks),))


def prefix(length: int) -> AttentionMask:
    """Causal, except that the first `length` keys are seen by every query (prefix LM)."""
    return AttentionMask((Interval(), Interval(ahead=None, below=length)))


def chunked(chunk: int) -> AttentionMask:
    """Keys at or before the query in the same chunk of `chunk` positions."""
    return AttentionMask((Interval(chunk=chunk),))


def lambda_shaped(window: int, num_sinks: int) -> AttentionMask:
    """The Λ mask: a sliding window and the kept first tokens.

    LM-Infinite (arXiv 2308.16137), section 4: visible iff j <= i and (j < G or i - j < W).
    """
    return sliding_window(window) | kept_sinks(num_sinks)

"""Settings as they are given, for all rows or one a row, as arrays."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

# Smaller numbers count as 0 in float32.
SMALLEST = float(np.finfo(np.float32).tiny)
LARGEST = float(np.finfo(np.float32).max)


def is_id(value: Any) -> bool:
    """Whether it is an integer, of Python's or NumPy's."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def is_list(value: Any) -> bool:
    """Whether it is a list of things, and no text."""
    return isinstance(value, Sequence | np.ndarray) and not isinstance(value, str)


@dataclasses.dataclass(frozen=True)
class Batch:
    """What settings are checked against.

    Attributes:
        rows: how many.
        vocab_size: ids are below it.
        stop_tokens: ids that end a text.
        max_new_tokens: most tokens to draw.
    """

    rows: int
    vocab_size: int = 0
    stop_tokens: tuple[int, ...] = ()
    max_new_tokens: int = 2**31 - 1

    def numbers(self, name: str, value: Any, low: float, high: float, dtype: Any) -> np.ndarray:
        """One number a row, within [low, high]."""
        span = f"[{low:.10g}, {high:.10g}]"
        try:
            given = np.asarray(value)
            x = given.astype(np.float64)
        except (TypeError, ValueError):
            given, x = np.zeros(0, object), np.zeros(0)
        if given.dtype.kind not in "iuf":
            raise ValueError(f"{name}={value!r}; allowed: a number in {span}, or one a row")
        if x.ndim and x.shape != (self.rows,):
            raise ValueError(f"{name} has {x.size} values; allowed: one, or {self.rows} (a row)")
        x = np.broadcast_to(x, (self.rows,))
        fine = (x >= low) & (x <= high)
        if not fine.all():
            raise ValueError(f"{name}={x[~fine][0]:.10g}; allowed: {span}")
        whole = x.astype(dtype)
        if np.issubdtype(dtype, np.integer) and (whole != x).any():
            raise ValueError(f"{name}={x[whole != x][0]:g}; allowed: an integer")
        return whole

    def check_ids(self, name: str, ids: Any) -> list[int]:
        """Ids of the vocabulary, at least one."""
        if not is_list(ids) or len(ids) == 0 or not all(map(is_id, ids)):
            raise ValueError(f"{name}={ids!r}; allowed: a non-empty list of token ids")
        for i in ids:
            if not 0 <= i < self.vocab_size:
                raise ValueError(f"{name}: token id {i}; allowed: 0 to {self.vocab_size - 1}")
        return [int(i) for i in ids]

    def check_bias(self, name: str, added: Any) -> None:
        """What may be added to a logit."""
        fine = isinstance(added, float | np.floating) or is_id(added)
        if not (fine and added <= LARGEST):
            raise ValueError(f"{name}={added!r}; allowed: a number up to {LARGEST:g}")

    def each(self, name: str, value: Any, is_one: Any) -> list[Any]:
        """A list with an entry a row, of a value for all of them or of a list of such values, None
        for rows that have none.

        Args:
            is_one: whether something is a value for all rows.
        """
        if is_one(value):
            return [value] * self.rows
        if not is_list(value) or not all(v is None or is_one(v) for v in value):
            raise ValueError(f"{name}={value!r}; allowed: one value, or one or None a row")
        if len(value) != self.rows:
            told = f"allowed: one, or {self.rows} (a row)"
            raise ValueError(f"{name} has {len(value)} values; {told}")
        return list(value)

    def tokens(self, name: str, value: Any) -> np.ndarray:
        """One token id a row, -1 where there is none."""
        found = np.full(self.rows, -1, np.int32)
        for row, token in enumerate(self.each(name, value, is_id)):
            if token is not None:
                (found[row],) = self.check_ids(name, [token])
        return found

    def mask(self, name: str, value: Any, absent: bool = False) -> np.ndarray:
        """Which tokens of the vocabulary are in each row's list; `absent` where it has none."""

        def is_one(v: Any) -> bool:
            return is_list(v) and all(map(is_id, v))

        found = np.zeros((self.rows, self.vocab_size), bool)
        for row, ids in enumerate(self.each(name, value, is_one)):
            if ids is None:
                found[row] = absent
            else:
                found[row, self.check_ids(name, ids)] = True
        return found

"""Strings at which a text ends; they are left out of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def check_stop(stop: Any) -> Sequence[str]:
    """The strings, none for None; ValueError for what is no list of non-empty ones."""
    if stop is None:
        return ()
    if not isinstance(stop, list | tuple) or not all(isinstance(s, str) and s for s in stop):
        raise ValueError(f"stop={stop!r}; allowed: a list of non-empty strings")
    return stop


def cut_at_stop(text: str, stop: Sequence[str]) -> str:
    """The text up to where the first of the stop strings begins; all of it without one."""
    found = (text.find(s) for s in stop)
    return text[: min((at for at in found if at >= 0), default=len(text))]


def surely_said(text: str, stop: Sequence[str]) -> str:
    """The part that no further text can take back: without an end that may begin a stop string."""

    def begun(s: str) -> int:
        sizes = range(min(len(s) - 1, len(text)), 0, -1)
        return next((n for n in sizes if text.endswith(s[:n])), 0)

    return text[: len(text) - max(map(begun, stop), default=0)]

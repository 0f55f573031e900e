"""Which of many cases are in every run, and which wait for `-m slow`."""

from collections.abc import Iterable
from typing import Any

import pytest


def slow_but(kept: Iterable[Any], cases: Iterable[Any]) -> list[Any]:
    """Cases for `pytest.mark.parametrize`: those that are not kept are marked slow.

    Raises:
        ValueError: one is to be kept that there is not.
    """
    cases, kept = list(cases), list(kept)
    if missing := [case for case in kept if case not in cases]:
        raise ValueError(f"kept={missing!r}; allowed: {cases}")
    return [c if c in kept else pytest.param(*into(c), marks=pytest.mark.slow) for c in cases]


def into(case: Any) -> tuple[Any, ...]:
    """The arguments of a case."""
    return case if isinstance(case, tuple) else (case,)

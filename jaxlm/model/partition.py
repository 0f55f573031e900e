"""Parameters in two parts, the learned and the rest, and whole again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any


def split(
    params: Mapping[str, Any], learned: Callable[[tuple[str, ...]], bool]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(the parameters that `learned` says are, the others); both nested as before.

    Args:
        params: nested dict of arrays, or of what stands for them.
        learned: path → whether it is.
    """

    def part(tree: Mapping[str, Any], path: tuple[str, ...], wanted: bool) -> dict[str, Any]:
        kept: dict[str, Any] = {}
        for name, value in tree.items():
            here = (*path, name)
            if isinstance(value, Mapping):
                if below := part(value, here, wanted):
                    kept[name] = below
            elif learned(here) == wanted:
                kept[name] = value
        return kept

    return part(params, (), True), part(params, (), False)


def combine(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """Both nested dicts in one; no leaf is in both."""
    whole = dict(one)
    for name, value in other.items():
        whole[name] = combine(whole[name], value) if name in whole else value
    return whole

"""Which block distances take part: drawn once a call, near ones more often than far ones."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

# A distance that no two blocks have, and so small that a block's number may be added to it.
NOWHERE = 2**30


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("distances", "log_weights"),
    meta_fields=("num_blocks",),
)
@dataclasses.dataclass(frozen=True)
class Sample:
    """Block distances (query block - key block) that take part, of all heads and rows alike.

    Attributes:
        distances: int32 [S], ascending from 1 on: a block always sees itself. What is left of S is
            filled with NOWHERE.
        log_weights: float32 [S], added to the scores at that distance.
        num_blocks: of the rows that it was drawn for.
    """

    distances: jax.Array
    log_weights: jax.Array
    num_blocks: int


def decaying_probabilities(
    num_blocks: int, exponent: float = 0.5, least: float = 0.05
) -> tuple[float, ...]:
    """Of distance 0, 1, 2, …: max(least, distance^-exponent), and 1 of distance 0.

    The paper that inspired this kernel leaves the distribution open; this one is our choice.

    Raises:
        ValueError: no blocks, a negative exponent, or a least probability not in (0, 1].
    """
    if num_blocks < 1:
        raise ValueError(f"num_blocks={num_blocks}; allowed: at least 1")
    if exponent < 0:
        raise ValueError(f"exponent={exponent}; allowed: at least 0")
    if not 0 < least <= 1:
        raise ValueError(f"least={least}; allowed: above 0, at most 1")
    return (1.0, *(max(least, d**-exponent) for d in range(1, num_blocks)))


def sample_distances(
    key: jax.Array,
    probabilities: Sequence[float],
    *,
    reweight: bool = True,
    most: int | None = None,
) -> Sample:
    """One draw for each distance; the same key draws the same.

    Args:
        key: of jax.random.
        probabilities: with which each distance takes part, [blocks of a row]; of 0 it is 1.
        reweight: scores at a distance of probability p rise by -log(p), so that sums over keys of
            exp(score) and of exp(score)·value are those of full attention on average.
        most: places for distances, 0 too; the farthest that are drawn beyond it are left out. None:
            four standard deviations above the mean.

    Raises:
        ValueError: a probability not in (0, 1], that of distance 0 below 1, or no place.
    """
    for distance, p in enumerate(probabilities):
        if not 0 < p <= 1:
            raise ValueError(f"probabilities[{distance}]={p}; allowed: above 0, at most 1")
    if not probabilities or probabilities[0] < 1:
        raise ValueError(
            f"probabilities[0]={probabilities[0] if probabilities else None}; allowed: 1, or the "
            "first block's queries might see nothing"
        )
    if most is not None and most < 1:
        raise ValueError(f"most={most}; allowed: at least 1")
    n = len(probabilities)
    if most is None:
        spread = math.sqrt(sum(p * (1 - p) for p in probabilities))
        most = min(n, math.ceil(sum(probabilities) + 4 * spread))
    chances = jnp.asarray(probabilities, jnp.float32)
    kept = jax.random.bernoulli(key, chances).at[0].set(False)
    distances = jnp.nonzero(kept, size=most - 1, fill_value=NOWHERE)[0].astype(jnp.int32)
    weights = (-jnp.log(chances)).at[distances].get(mode="fill", fill_value=0.0)
    return Sample(distances, weights if reweight else jnp.zeros_like(weights), n)

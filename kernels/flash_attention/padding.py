"""Arrays of any length as the kernels want them: whole blocks of queries and stretches of keys."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from kernels.flash_attention.kernel import Settings, Tokens, Trained
from kernels.flash_attention.segments import count_up
from kernels.flash_attention.sinks import NOWHERE


def whole_blocks(
    settings: Settings, x: Trained, segment_ids: jax.Array | None, positions: jax.Array | None
) -> tuple[Trained, Tokens]:
    """Pads what is too short; ids say what is padding where the pattern does not hide it."""
    B, _, T, _ = x.q.shape
    block = math.lcm(*(b.block_q for b in settings.blocks))
    stretch = math.lcm(*(b.stretch for b in settings.blocks))
    queries = -(-T // block) * block
    keys = -(-queries // stretch) * stretch
    # Padding is later than all tokens: a causal mask hides it from them without segment ids.
    if segment_ids is None and (positions is not None or (queries != T and settings.ahead != 0)):
        segment_ids = jnp.ones((B, T), jnp.int32)
    if positions is None and (settings.num_sinks or settings.prefix is not None):
        positions = count_up(jnp.ones((B, T), jnp.int32) if segment_ids is None else segment_ids)
    fire = None
    if x.fire is not None:
        # At the ends: the least and the most of a tile stay those of its tokens.
        numerator = jnp.pad(x.fire.numerator, keys - T, mode="edge")
        reciprocal = jnp.pad(x.fire.reciprocal, ((0, 0), (0, queries - T)), mode="edge")
        fire = x.fire._replace(numerator=numerator, reciprocal=reciprocal)
    of_queries = {name: _pad(getattr(x, name), 2, queries) for name in ("q", "q_far")}
    of_keys = {name: _pad(getattr(x, name), 2, keys) for name in ("k", "v", "k_far")}
    tokens = Tokens(_pad(segment_ids, 1, keys), _pad(positions, 1, keys, NOWHERE))
    return x._replace(**of_queries, **of_keys, fire=fire), tokens


def _pad(x: jax.Array | None, axis: int, length: int, value: int = 0) -> jax.Array | None:
    if x is None or x.shape[axis] == length:
        return x
    widths = [(0, length - n if a == axis else 0) for a, n in enumerate(x.shape)]
    return jnp.pad(x, widths, constant_values=value)

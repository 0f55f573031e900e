"""Arrays of any length as the kernels want them: whole blocks of queries and stretches of keys."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from kernels.flash_attention.kernel import Settings, Tokens, Trained
from kernels.flash_attention.segments import count_up
from kernels.flash_attention.sinks import NOWHERE


def whole_blocks(settings: Settings, x: Trained, tokens: Tokens) -> tuple[Trained, Tokens]:
    """Pads what is too short; ids say what is padding where the pattern does not hide it.

    Raises:
        ValueError: blocks of which a stretch of the queries is not whole ones.
    """
    B, _, T, _ = x.q.shape
    S, (segment_ids, positions, first_query, of_q) = x.k.shape[2], tokens
    block = math.lcm(*(b.block_q for b in settings.blocks))
    stretch = math.lcm(*(b.stretch for b in settings.blocks))
    queries = -(-T // block) * block
    if first_query is not None and queries != T:
        raise ValueError(f"first_query with {T} queries in blocks of {block}; allowed: whole ones")
    keys = -(-S // block) * block
    keys = -(-keys // stretch) * stretch
    length = queries if first_query is None else keys  # of what the band is of
    # Padding is later than all tokens: a causal mask hides it from them without segment ids.
    if segment_ids is None and (positions is not None or (length != S and settings.ahead != 0)):
        segment_ids = jnp.ones((B, S), jnp.int32)
    if positions is None and (settings.num_sinks or settings.prefix is not None):
        positions = count_up(jnp.ones((B, S), jnp.int32) if segment_ids is None else segment_ids)
    fire = None
    if x.fire is not None:
        # At the ends: the least and the most of a tile stay those of its tokens.
        numerator = jnp.pad(x.fire.numerator, keys - T, mode="edge")
        reciprocal = jnp.pad(x.fire.reciprocal, ((0, 0), (0, queries - T)), mode="edge")
        fire = x.fire._replace(numerator=numerator, reciprocal=reciprocal)
    of_queries = {name: _pad(getattr(x, name), 2, queries) for name in ("q", "q_far")}
    of_keys = {name: _pad(getattr(x, name), 2, keys) for name in ("k", "v", "k_far")}
    ids, positions = _pad(segment_ids, 1, keys), _pad(positions, 1, keys, NOWHERE)
    if of_q is not None:
        of_q = jax.tree.map(lambda a: _pad(a, 1, queries), of_q)
    return x._replace(**of_queries, **of_keys, fire=fire), Tokens(ids, positions, first_query, of_q)


def _pad(x: jax.Array | None, axis: int, length: int, value: int = 0) -> jax.Array | None:
    if x is None or x.shape[axis] == length:
        return x
    widths = [(0, length - n if a == axis else 0) for a, n in enumerate(x.shape)]
    return jnp.pad(x, widths, constant_values=value)

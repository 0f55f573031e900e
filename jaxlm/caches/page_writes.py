"""Writing new tokens into the pages that `jaxlm.caches.pages` found for them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from jaxlm.caches.pages import Claims


def begin(buffers: tuple[Array, ...], claims: Claims) -> tuple[Array, ...]:
    """New pages, as copies of others or of page 0: what was in them before is gone."""
    order = jnp.argsort(~claims.new.reshape(-1), stable=True)
    sources, pages = claims.sources.reshape(-1)[order], claims.pages.reshape(-1)[order]

    def copy(i: Array, buffers: tuple[Array, ...]) -> tuple[Array, ...]:
        return tuple(
            jax.lax.dynamic_update_slice_in_dim(
                b, jax.lax.dynamic_slice_in_dim(b, sources[i], 1, 1), pages[i], 1
            )
            for b in buffers
        )

    return jax.lax.fori_loop(0, claims.new.sum(), copy, buffers)


def write(
    buffers: tuple[Array, ...], new: list[Array], claims: Claims, counts: Int[Array, "B"]
) -> tuple[Array, ...]:
    """The first `counts` of T new tokens of each row, one stretch of its pages after the other."""
    M, T, page = claims.pages.shape[1], new[0].shape[3], buffers[0].shape[3]
    length = min(T, page)  # of a stretch
    starts = jnp.clip(claims.firsts, 0, page - length)
    tokens = starts - claims.firsts  # the one at the start of each stretch
    # A stretch may begin before the first token and end behind the last.
    pad = ((0, 0), (0, 0), (0, 0), (length - 1, length - 1), (0, 0))
    new = [jnp.pad(x, pad) for x in new]

    def stretch(i: Array, buffers: tuple[Array, ...]) -> tuple[Array, ...]:
        row, j = i // M, i % M
        token = tokens[row, j] + jnp.arange(length)
        there = (token >= 0) & (token < counts[row]) & claims.written[row, j]
        return tuple(written(b, x, there, row, j) for b, x in zip(buffers, new, strict=True))

    def written(buffer: Array, x: Array, there: Array, row: Array, j: Array) -> Array:
        layers, _, K, _, H = buffer.shape
        size = (layers, 1, K, length, H)
        at = (0, claims.pages[row, j], 0, starts[row, j], 0)
        old = jax.lax.dynamic_slice(buffer, at, size)
        part = jax.lax.dynamic_slice(x, (0, row, 0, tokens[row, j] + length - 1, 0), size)
        part = jnp.where(there[None, None, None, :, None], part.astype(buffer.dtype), old)
        return jax.lax.dynamic_update_slice(buffer, part, at)

    return jax.lax.fori_loop(0, claims.pages.size, stretch, buffers)

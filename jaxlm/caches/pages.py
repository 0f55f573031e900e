"""Which page of a pool belongs to which rows: a table of pages, and how many rows hold each.

Rows that began alike hold the same pages. A row that writes into a page that others hold too takes
a copy of it first (copy-on-write); full pages are never written, so never copied.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

# A page of zeros that is never written or given out: what a table says where a row has no page.
NOTHING = 0


class Claims(NamedTuple):
    """What T more tokens a row do to the table: they lie in at most M pages of a row.

    Attributes:
        table, holders: afterwards.
        firsts: where the first new token would lie in each page; below 0 past the first page.
        pages: where tokens go.
        written: which of them get any.
        new: which of them are taken from the free ones.
        sources: what such a one begins as a copy of.
        unplaced: rows for which there were no pages, or whose table is full: nothing is written.
    """

    table: Int[Array, "B n"]
    holders: Int[Array, "P"]
    firsts: Int[Array, "B M"]
    pages: Int[Array, "B M"]
    written: Bool[Array, "B M"]
    new: Bool[Array, "B M"]
    sources: Int[Array, "B M"]
    unplaced: Bool[Array, "B"]


def holders_of(table: Int[Array, "B n"], num_pages: int) -> Int[Array, "P"]:
    """How many rows hold each page; `NOTHING` counts as held for ever."""
    counts = jnp.zeros(num_pages, jnp.int32).at[table.reshape(-1)].add(1)
    return counts.at[NOTHING].set(1)


def claim(
    table: Int[Array, "B n"],
    holders: Int[Array, "P"],
    lengths: Int[Array, "B"],
    counts: Int[Array, "B"],
    page: int,
    most: int,
) -> Claims:
    """Pages for `counts` of at most `most` tokens behind the first `lengths` of each row.

    Of the rows that write into one page the last keeps it if no other row holds it. So as many
    pages as the rows have entries in the table are always enough.

    Args:
        page: tokens of one.
    """
    B, n = table.shape
    fits = lengths + counts <= n * page
    counts = jnp.where(fits, counts, 0)
    M = (most + page - 2) // page + 1
    at = lengths[:, None] // page + jnp.arange(M)[None]  # in the table
    firsts = lengths[:, None] - at * page
    written = (firsts + counts[:, None] > 0) & (counts > 0)[:, None]
    held = jnp.take_along_axis(table, jnp.minimum(at, n - 1), 1)
    begun = (firsts > 0) & written
    last, writes = held[:, 0], begun[:, 0]
    same = jnp.tril(last[:, None] == last[None], -1) & writes[None]
    left = same.sum(1, dtype=jnp.int32)  # rows before this one that will have left its page
    shared = writes & (holders[last] - left > 1)
    new = written & (~begun | shared[:, None])
    rank = jnp.cumsum(new.reshape(-1), dtype=jnp.int32).reshape(B, M) - 1
    free = holders == 0
    placed = fits & ~(new & (rank >= free.sum())).any(1)
    written, new = written & placed[:, None], new & placed[:, None]
    found = jnp.flatnonzero(free, size=B * M, fill_value=NOTHING)
    pages = jnp.where(new, found[jnp.maximum(rank, 0)], held)
    sources = jnp.where(begun, held, NOTHING)
    copied = (new & begun).astype(jnp.int32)
    return Claims(
        table.at[jnp.arange(B)[:, None], jnp.where(new, at, n)].set(pages, mode="drop"),
        holders.at[sources].add(-copied).at[pages].add(new.astype(jnp.int32)),
        firsts,
        pages,
        written,
        new,
        sources,
        ~placed,
    )

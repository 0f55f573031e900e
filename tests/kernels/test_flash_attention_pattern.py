"""Which blocks and which sinks a query block sees, without a kernel."""

import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.flash_attention.pattern import Band
from kernels.flash_attention.segments import block_bounds
from kernels.flash_attention.sinks import NOWHERE, find_sinks


@settings(deadline=None)
@given(
    ahead=st.one_of(st.none(), st.integers(0, 20)),
    window=st.one_of(st.none(), st.integers(1, 20)),
    block_k=st.integers(1, 4),
    ratio=st.integers(1, 3),
    num_blocks_q=st.integers(1, 6),
)
def test_every_visible_pair_is_visited_once(ahead, window, block_k, ratio, num_blocks_q):
    block_q = block_k * ratio
    band = Band(ahead, window, block_q, block_k, num_blocks_q, num_blocks_q * ratio)
    T = num_blocks_q * block_q
    i, j = np.arange(T)[:, None], np.arange(T)[None]
    seen = np.ones((T, T), bool)
    seen &= (j - i <= ahead) if ahead is not None else True
    seen &= (i - j < window) if window is not None else True
    assert band.num_pairs(T) == seen.sum()
    for block in range(num_blocks_q):
        rows = seen[block * block_q : (block + 1) * block_q]
        whole = range(*(int(x) for x in band.whole(block)))
        edges = [block * ratio + e for e in band.edges()]
        edges = [kb for kb in edges if 0 <= kb < band.num_blocks_k]
        tiles = rows.reshape(block_q, -1, block_k)
        assert list(whole) == [kb for kb in range(band.num_blocks_k) if tiles[:, kb].all()]
        partly = [kb for kb in range(band.num_blocks_k) if tiles[:, kb].any()]
        assert sorted([*whole, *edges]) == partly
        if partly:
            first, last = (int(x) for x in band.visible_blocks(block))
            assert (first, last) == (partly[0], partly[-1])


def test_bounds_of_packed_rows():
    ids = jnp.asarray([[1, 1, 1, 2, 2, 3, 3, 3, 0, 0, 0, 0], [7, 0, 7, 0, 0, 0, 4, 4, 4, 4, 4, 7]])
    bounds = block_bounds(ids.astype(jnp.int32), None, block_q=3, block_k=2)
    assert bounds[..., :2].tolist() == [
        [[0, 2], [1, 4], [2, 4], [0, 0]],
        [[0, 6], [0, 0], [3, 6], [0, 6]],
    ]
    open_ends = jnp.asarray([[1, 0, 3, 0, 0, 0, 12, 0, 0, 0, 0, 0], [0] * 12], jnp.int32)
    bounds = block_bounds(ids.astype(jnp.int32), open_ends, block_q=3, block_k=2)
    assert bounds[..., 2].tolist() == [[2, 0, 6, 0], [0, 0, 0, 0]]


def test_which_tokens_are_sinks():
    """Of documents that begin in the row, and of one that began before it."""
    ids = jnp.asarray([[1] * 5 + [2] * 8 + [0] * 3], jnp.int32)
    positions = jnp.asarray([[*range(2, 7), *range(8), 0, 0, 0]], jnp.int32)
    found = find_sinks(ids, positions, num_sinks=3, block_q=4)
    real = [[slot for slot in row if slot != NOWHERE] for row in found.slots[0].tolist()]
    # The first token of the row is at position 2, the only sink of its document.
    assert real == [[0], [0], [5, 6, 7], [5, 6, 7]]
    assert found.segments.tolist() == [[1, 1, 2, 2]]

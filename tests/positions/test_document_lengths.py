"""The length of each token's own document."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxlm.positions.document_lengths import document_lengths

LENGTH = 9


def lengths(positions, segments):
    return np.asarray(document_lengths(*(jnp.asarray(a, jnp.int32) for a in (positions, segments))))


@pytest.mark.parametrize(
    ("positions", "segments", "want"),
    [
        ([0, 1, 2, 3], [1, 1, 1, 1], [4, 4, 4, 4]),
        ([0, 0, 0, 1], [0, 0, 1, 1], [1, 1, 2, 2]),
        ([0, 1, 2, 0, 1, 0], [7, 7, 7, 2, 2, 0], [3, 3, 3, 2, 2, 1]),
        ([5, 0, 6, 1], [1, 2**31 - 1, 1, 2**31 - 1], [7, 2, 7, 2]),
    ],
    ids=["one", "left padding", "packed", "interleaved"],
)
def test_lengths_by_hand(positions, segments, want):
    np.testing.assert_array_equal(lengths([positions], [segments]), [want])


rows = st.lists(st.integers(0, 5), min_size=2 * LENGTH, max_size=2 * LENGTH)


@given(rows, rows)
def test_every_segment_of_every_row_has_its_own(positions, segments):
    at, ids = (np.asarray(a).reshape(2, LENGTH) for a in (positions, segments))
    same = ids[:, :, None] == ids[:, None, :]
    np.testing.assert_array_equal(lengths(at, ids), np.where(same, at[:, None, :], -1).max(-1) + 1)

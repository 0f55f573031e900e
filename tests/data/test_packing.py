"""Rows of one length from documents of any: held to invariants and to a slow packer."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxlm.data.packing import pack, pieces

lengths = st.lists(st.integers(1, 40), min_size=1, max_size=40).map(np.array)
row_lengths = st.integers(1, 24)


def slow_pieces(document_lengths, row_length):
    """One piece after the other: documents overlap in the one token that both predict from."""
    found, start = [], 0
    for length in document_lengths.tolist():
        at, left = start, length - 1
        while left > 0:
            found.append((at, min(left, row_length)))
            at, left = at + row_length, left - row_length
        start += length
    return found


def slow_rows(piece_list, row_length):
    """Best fit, longest first, by looking at every row."""
    rows = []
    for piece in sorted(piece_list, key=lambda p: -p[1]):
        rooms = [(row_length - sum(n for _, n in row), i) for i, row in enumerate(rows)]
        fitting = [room for room in rooms if room[0] >= piece[1]]
        if fitting:
            rows[min(fitting)[1]].append(piece)
        else:
            rows.append([piece])
    return rows


def rows_of(packing):
    pairs = list(zip(packing.starts.tolist(), packing.lengths.tolist(), strict=True))
    ends = packing.offsets.tolist()
    return [pairs[a:b] for a, b in itertools.pairwise(ends)]


@given(lengths, row_lengths)
def test_pieces(document_lengths, row_length):
    starts, sizes = pieces(document_lengths, row_length)
    found = list(zip(starts.tolist(), sizes.tolist(), strict=True))
    assert found == slow_pieces(document_lengths, row_length)


@given(lengths, row_lengths)
def test_rows(document_lengths, row_length):
    piece_list = slow_pieces(document_lengths, row_length)
    rows = rows_of(pack(*pieces(document_lengths, row_length), row_length))
    # Of rows with the same room either is a best fit: the sums agree, not always the pieces.
    wanted = slow_rows(piece_list, row_length)
    assert sorted(sum(n for _, n in r) for r in rows) == sorted(
        sum(n for _, n in r) for r in wanted
    )
    assert all(0 < sum(n for _, n in r) <= row_length for r in rows)
    assert all(r == sorted(r) for r in rows)
    # Every piece in one row, and so every prediction once.
    assert sorted(p for r in rows for p in r) == sorted(piece_list)


@given(lengths, row_lengths)
def test_every_prediction_once(document_lengths, row_length):
    packing = pack(*pieces(document_lengths, row_length), row_length)
    predicted = np.zeros(document_lengths.sum(), int)
    for start, n in zip(packing.starts, packing.lengths, strict=True):
        predicted[start + 1 : start + n + 1] += 1
    firsts = np.cumsum(document_lengths) - document_lengths
    wanted = np.ones_like(predicted)
    wanted[firsts] = 0  # nothing comes before a document's first token
    np.testing.assert_array_equal(predicted, wanted)
    slots = row_length * (len(packing.offsets) - 1)
    used = wanted.sum()
    assert packing.waste(row_length) == pytest.approx(1 - used / slots if slots else 1, abs=1e-12)


@pytest.mark.parametrize("row_length", [128, 512, 2048])
@pytest.mark.parametrize("median", [60, 400, 3000])
@pytest.mark.parametrize("seed", [0, 1])
def test_waste_on_documents_of_mixed_length(row_length, median, seed):
    """Log-normal lengths, as those of web pages and books: a factor e is one deviation."""
    generator = np.random.default_rng(seed)
    sizes = np.ceil(generator.lognormal(np.log(median), 1.0, 4000)).astype(np.int64) + 1
    packing = pack(*pieces(sizes, row_length), row_length)
    assert packing.waste(row_length) <= 0.02
    # The last row can't be full: even one packer of all, a sum, would need that many.
    fewest = -(-int((sizes - 1).sum()) // row_length)
    assert len(packing.offsets) - 1 <= 1.02 * fewest + 1


def test_what_does_not_fit_together_is_not_forced():
    """All of one length just above half a row: waste is in the documents, not the packer."""
    packing = pack(*pieces(np.full(10, 65 + 1), 128), 128)
    assert len(packing.offsets) - 1 == 10


def test_rows_of_a_million_tokens():
    sizes = np.full(2001, 1001)
    packing = pack(*pieces(sizes, 1_000_000), 1_000_000)
    assert np.diff(packing.offsets).tolist() == [1000, 1000, 1]

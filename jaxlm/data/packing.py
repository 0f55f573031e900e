"""Documents into rows of one length: nothing lost, little wasted, nothing mixed."""

from __future__ import annotations

import bisect
import dataclasses

import numpy as np
from absl import logging
from jaxtyping import Int


@dataclasses.dataclass(frozen=True)
class Packing:
    """Rows as runs of the flat token array.

    Segment s predicts tokens starts[s] + 1 … starts[s] + lengths[s] from those one before them;
    row r holds segments offsets[r] … offsets[r + 1] - 1.
    """

    offsets: Int[np.ndarray, "R1"]
    starts: Int[np.ndarray, "S"]
    lengths: Int[np.ndarray, "S"]

    def waste(self, row_length: int) -> float:
        """Share of slots that hold no prediction."""
        rows = len(self.offsets) - 1
        return 1.0 - float(self.lengths.sum()) / max(rows * row_length, 1)


def pieces(
    document_lengths: Int[np.ndarray, "D"], row_length: int
) -> tuple[Int[np.ndarray, "P"], Int[np.ndarray, "P"]]:
    """(starts, lengths) of the segments that documents, one after the other, are cut into.

    A document of m tokens has m - 1 predictions, and a piece at most `row_length` of them. The last
    target of a piece is the first input of the next, so cutting loses none.
    """
    document_starts = np.cumsum(document_lengths) - document_lengths
    predictions = np.maximum(document_lengths - 1, 0)
    counts = -(-predictions // row_length)
    document = np.repeat(np.arange(len(counts)), counts)
    first = np.cumsum(counts) - counts
    offset = (np.arange(len(document)) - first[document]) * row_length
    lengths = np.minimum(predictions[document] - offset, row_length)
    return document_starts[document] + offset, lengths


def pack(starts: Int[np.ndarray, "P"], lengths: Int[np.ndarray, "P"], row_length: int) -> Packing:
    """Best fit, longest first: each piece goes to the fullest row that has room.

    Within 22 % of the fewest rows at worst (Johnson 1973), in practice within 1 %: documents of
    mixed length fill each other's gaps.
    """
    order = np.argsort(-lengths, kind="stable")
    rows_with: dict[int, list[int]] = {}  # rows by the room that is left in them
    rooms: list[int] = []  # the keys, sorted
    row_of = np.empty(len(order), np.int64)
    rows = 0
    for piece in order.tolist():
        n = int(lengths[piece])
        at = bisect.bisect_left(rooms, n)
        if at < len(rooms):
            room = rooms[at]
            row = rows_with[room].pop()
            if not rows_with[room]:
                del rows_with[room], rooms[at]
        else:
            room, row = row_length, rows
            rows += 1
        row_of[piece] = row
        left = room - n
        if left and left not in rows_with:
            bisect.insort(rooms, left)
        if left:
            rows_with.setdefault(left, []).append(row)
    by_row = np.lexsort((starts, row_of))
    offsets = np.searchsorted(row_of[by_row], np.arange(rows + 1))
    return Packing(offsets, starts[by_row], lengths[by_row])


def pack_pairs(document_lengths: Int[np.ndarray, "D"], row_length: int, where: str) -> Packing:
    """Documents 0 and 1, 2 and 3, …, each pair within one row, side by side.

    A pair longer than a row is left out, with a warning that counts them; `where` they are from.

    Raises:
        ValueError: all are longer.
    """
    starts = np.cumsum(document_lengths) - document_lengths
    predictions = np.maximum(document_lengths - 1, 0).reshape(-1, 2)
    fits = predictions.sum(1) <= row_length
    if not fits.any():
        raise ValueError(
            f"{where}: data.sequence_length={row_length}; allowed: at least "
            f"{predictions.sum(1).min()}, the tokens of the shortest pair"
        )
    if not fits.all():
        logging.warning("%s: %d of %d pairs are longer than a row", where, (~fits).sum(), len(fits))
    first = starts.reshape(-1, 2)[fits]
    both = pack(first[:, 0], predictions[fits].sum(1), row_length)
    # Each pair is found by where its first document starts.
    order = np.searchsorted(first[:, 0], both.starts)
    return Packing(2 * both.offsets, first[order].reshape(-1), predictions[fits][order].reshape(-1))

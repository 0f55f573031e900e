"""A table of tensors' names, theirs and ours, that is read in both directions."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence

import numpy as np

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Row:
    """One tensor of a checkpoint, and the parameter or parameters it holds.

    Attributes:
        theirs: its name there; {layer} and {expert} stand for numbers.
        ours: the parameter's path, within its block if it is a layer's. Several, with a space
            between: the tensor holds them one after another along its axis p.
        layout: einops' notation, theirs to ours: "(n h) d -> d n h" splits the rows of a matrix
            into heads and moves the columns to the front. Of several parameters
            "(g p h) d -> d (g p) h": within each of `groups` groups of rows first the heads of the
            first, then those of the second, …. A number is an axis of that length:
            "(n r 2) -> n (2 r)" parts neighbours.
        groups: the length of axis g.
    """

    theirs: str
    ours: str
    layout: str
    groups: int = 1

    @property
    def paths(self) -> list[str]:
        """Of the parameters."""
        return self.ours.split()

    def their_shape(self, shapes: Sequence[Shape]) -> Shape:
        """The tensor's shape, if the parameters have these."""
        left, _ = self._axes()
        sizes = self._sizes(shapes)
        return tuple(math.prod(sum(sizes[a]) for a in group) for group in left)

    def to_ours(self, tensor: np.ndarray, shapes: Sequence[Shape]) -> list[np.ndarray]:
        """The parameters, of these shapes; views of the tensor where they can be."""
        left, right = self._axes()
        sizes, order = self._sizes(shapes), [*itertools.chain(*left)]
        x = tensor.reshape([sum(sizes[a]) for a in order])
        turn = [order.index(a) for a in itertools.chain(*right)]
        parts = [x]
        if "p" in order:
            parts = np.split(x, np.cumsum(sizes["p"])[:-1], order.index("p"))
        return [y.transpose(turn).reshape(s) for y, s in zip(parts, shapes, strict=True)]

    def to_theirs(self, parameters: Sequence[np.ndarray]) -> np.ndarray:
        """The tensor."""
        left, right = self._axes()
        shapes = [x.shape for x in parameters]
        sizes, order = self._sizes(shapes), [*itertools.chain(*right)]
        turn = [order.index(a) for a in itertools.chain(*left)]
        parts = []
        for i, x in enumerate(parameters):
            own = [sizes[a][i] if a == "p" else sum(sizes[a]) for a in order]
            parts.append(x.reshape(own).transpose(turn))
        at = [*itertools.chain(*left)].index("p") if "p" in order else 0
        return np.concatenate(parts, at).reshape(self.their_shape(shapes))

    def _axes(self) -> tuple[list[list[str]], list[list[str]]]:
        """The axes of theirs and of ours, grouped."""
        left, right = self.layout.split(" -> ")
        return _groups(left), _groups(right)

    def _sizes(self, shapes: Sequence[Shape]) -> dict[str, list[int]]:
        """Of each axis; of p, one for each parameter."""
        _, right = self._axes()
        sizes = {"g": [self.groups]}
        for i, group in enumerate(right):
            if "p" in group:
                others = math.prod(self.groups for a in group if a == "g")
                sizes["p"] = [shape[i] // others for shape in shapes]
            else:
                sizes |= {a: [int(a)] for a in group if a.isdigit()}
                (axis,) = (a for a in group if not a.isdigit())
                sizes[axis] = [shapes[0][i] // math.prod(int(a) for a in group if a.isdigit())]
        return sizes


def _groups(text: str) -> list[list[str]]:
    """ "(n h) d" → [[n, h], [d]]."""
    groups: list[list[str]] = []
    inside = False
    for word in text.replace("(", "( ").replace(")", " )").split():
        if word in "()":
            inside = word == "("
            groups += [[]] if inside else []
        elif inside:
            groups[-1].append(word)
        else:
            groups.append([word])
    return groups


def linear(
    theirs: str, ours: str, layout: str, bias: str | None = None, groups: int = 1
) -> list[Row]:
    """A matrix and, by a layout of its own, its bias; `ours` may be several with a space."""
    paths, table = ours.split(), []
    for name, parameter, how in (("weight", "kernel", layout), ("bias", "bias", bias)):
        if how is not None:
            table.append(
                Row(f"{theirs}.{name}", " ".join(f"{p}/{parameter}" for p in paths), how, groups)
            )
    return table


def norm(theirs: str, ours: str, bias: bool) -> list[Row]:
    """A norm's scale and, with LayerNorm, its bias."""
    table = [Row(f"{theirs}.weight", f"{ours}/scale", "d -> d")]
    return [*table, Row(f"{theirs}.bias", f"{ours}/bias", "d -> d")] if bias else table

"""A table of parameter names, theirs and ours, that is read in both directions."""

from __future__ import annotations

import dataclasses
import math

import numpy as np


@dataclasses.dataclass(frozen=True)
class Row:
    """One tensor of a checkpoint and the parameter it is.

    Attributes:
        theirs: its name there; {layer} stands for the layer's number.
        ours: the parameter's path; of a layer's, within its block.
        layout: einops' notation, theirs to ours: "(n h) d -> d n h" splits the rows of a matrix
            into heads and moves the columns to the front.
    """

    theirs: str
    ours: str
    layout: str

    @property
    def per_layer(self) -> bool:
        """Whether every layer has such a tensor."""
        return "{layer}" in self.theirs

    def their_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The tensor's shape, if the parameter's is `shape`."""
        groups, axes = self._axes()
        sizes = dict(zip(axes, shape, strict=True))
        return tuple(math.prod(sizes[a] for a in group) for group in groups)

    def to_ours(self, tensor: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """The parameter, of `shape`: a view of the tensor."""
        groups, axes = self._axes()
        sizes = dict(zip(axes, shape, strict=True))
        order = [a for group in groups for a in group]
        return tensor.reshape([sizes[a] for a in order]).transpose([order.index(a) for a in axes])

    def to_theirs(self, parameter: np.ndarray) -> np.ndarray:
        """The tensor."""
        groups, axes = self._axes()
        turned = parameter.transpose([axes.index(a) for group in groups for a in group])
        return turned.reshape(self.their_shape(parameter.shape))

    def _axes(self) -> tuple[list[list[str]], list[str]]:
        """The axes of theirs, grouped, and those of ours."""
        left, right = self.layout.split(" -> ")
        groups: list[list[str]] = []
        inside = False
        for word in left.replace("(", "( ").replace(")", " )").split():
            if word in "()":
                inside = word == "("
                groups += [[]] if inside else []
            elif inside:
                groups[-1].append(word)
            else:
                groups.append([word])
        return groups, right.split()

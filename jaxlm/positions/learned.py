"""A trained vector per absolute position, added to the token embedding."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from jaxlm.positions.encoding import Dimensions, Parameter, PositionEncoding, require
from jaxlm.positions.registry import register


@register
@dataclasses.dataclass(frozen=True)
class Learned(PositionEncoding):
    """x_t + table[t + offset]; the table ends at `table_length`.

    A position past the table gives NaN rather than a clamped row: entry points check lengths
    before they compile, and a mistake that slips through must not look like an answer.

    Attributes:
        table_length: rows; None: the model's context length, and the offset.
        offset: the row of position 0 (RoBERTa: 2).
    """

    table_length: int | None = None
    offset: int = 0

    name: ClassVar[str] = "learned"
    relative: ClassVar[bool] = False

    @property
    def max_length(self):
        """Positions at or past it have no row."""
        return None if self.table_length is None else self.table_length - self.offset

    @property
    def two_sided(self):
        """Every position has a row."""
        return True

    def bind(self, dims: Dimensions) -> Learned:
        """Takes the table's length from the model where none was given."""
        require(self.offset >= 0, "learned: offset", self.offset, "an integer >= 0")
        length = self.table_length
        length = dims.context_length + self.offset if length is None else length
        allowed = f"an integer >= {1 + self.offset}"
        require(length > self.offset, "learned: table_length", length, allowed)
        return dataclasses.replace(self, table_length=length)

    def parameters(self, dims):
        """One row a position, as small as a token's embedding."""
        assert self.table_length is not None
        init = jax.nn.initializers.normal(dims.d_model**-0.5)
        return {"table": Parameter((self.table_length, dims.d_model), init, (None, "embed"))}

    def embed(self, params, x, positions):
        """x + table[position + offset]."""
        if x.shape[1] > self.max_length:
            raise ValueError(
                f"length={x.shape[1]}; allowed: at most {self.max_length} "
                f"with position_encoding={self}"
            )
        at = params["table"].at[positions + self.offset]
        rows = at.get(mode="fill", fill_value=jnp.nan)
        return x + rows.astype(x.dtype)

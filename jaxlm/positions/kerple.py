"""KERPLE: a trained, conditionally positive definite kernel of the distance."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from jaxlm.positions.encoding import Dimensions, Parameter, PositionEncoding, require
from jaxlm.positions.registry import register


@register
@dataclasses.dataclass(frozen=True)
class Kerple(PositionEncoding):
    """score - r1·log(1 + r2·d), or - r1·d^r2 (Chi et al. 2022, arXiv 2205.09921, section 4).

    r1, r2 > 0 are trained per head; we keep their logarithms, which makes the constraint hold by
    itself. In the power form r2 is also at most 2, above which the kernel is not positive definite.

    Attributes:
        kind: "log" (the paper's best) or "power".
    """

    kind: str = "log"

    name: ClassVar[str] = "kerple"

    @property
    def changes_scores(self):
        """Adds a bias."""
        return True

    def bind(self, dims: Dimensions) -> Kerple:
        """Checks the kind."""
        require(self.kind in ("log", "power"), "kerple: kind", self.kind, "log, power")
        return self

    def parameters(self, dims):
        """log r1 and log r2 per head: spread over the heads, so that they differ from the start."""

        def spread(key, shape, dtype):
            del key
            return jnp.linspace(-2.0, 0.0, shape[0], dtype=dtype)

        zeros = jax.nn.initializers.zeros
        return {
            "log_r1": Parameter((dims.num_heads,), spread, ("heads",)),
            "log_r2": Parameter((dims.num_heads,), zeros, ("heads",)),
        }

    def head_parameters(self, params, num_heads):
        """(r1, r2) of each head."""
        r1, r2 = (jnp.exp(params[n].astype(jnp.float32)) for n in ("log_r1", "log_r2"))
        return (r1, r2) if self.kind == "log" else (r1, jnp.minimum(r2, 2.0))

    def bias(self, head, distance, q_positions):
        """The negated kernel; a future key counts as distance 0."""
        r1, r2 = head
        d = jnp.maximum(distance, 0).astype(jnp.float32)
        if self.kind == "log":
            return -r1 * jnp.log1p(r2 * d)
        # d = 0 apart: the derivative of d^r2 in r2 would be 0·log 0 there.
        safe = jnp.maximum(d, 1.0)
        return jnp.where(d > 0, -r1 * safe**r2, 0.0)

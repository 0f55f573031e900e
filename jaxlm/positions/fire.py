"""FIRE: a small network of the distance, measured relative to the query's position."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from jaxlm.positions.encoding import LARGE, Dimensions, Parameter, PositionEncoding, require
from jaxlm.positions.registry import register
from kernels.flash_attention import Fire


def numerator(head, distance):
    """ψ(distance)."""
    return jnp.log1p(jnp.abs(head["c"]) * jnp.maximum(distance, 0).astype(jnp.float32))


def denominator(head, q_positions):
    """ψ(max(L, i)), above 0."""
    whole = jnp.maximum(jnp.abs(head["threshold"]), q_positions.astype(jnp.float32))
    return jnp.maximum(jnp.log1p(jnp.abs(head["c"]) * whole), 1e-6)


@register
@dataclasses.dataclass(frozen=True)
class FIRE(PositionEncoding):
    """score + f(ψ(i - j) / ψ(max(L, i))), ψ(x) = log(c·x + 1) (Li et al. 2024, arXiv 2310.04418).

    f is a two-layer ReLU network with one output per head; c and the threshold L are trained.

    Attributes:
        width: hidden units of f (the paper's 32).
        threshold: initial L, below which distances are not normalised further; None: half the
            model's context length, so that both regimes are met in training [our choice].
    """

    width: int = 32
    threshold: float | None = None

    name: ClassVar[str] = "fire"
    relative: ClassVar[bool] = False  # beyond L the same distance counts less for later queries

    @property
    def changes_scores(self):
        """Adds a bias."""
        return True

    @property
    def score_form(self):
        """A network."""
        return "network"

    def bind(self, dims: Dimensions) -> FIRE:
        """Fills the threshold."""
        require(self.width >= 1, "fire: width", self.width, "an integer >= 1")
        threshold = dims.context_length / 2 if self.threshold is None else self.threshold
        require(0 < threshold <= LARGE, "fire: threshold", threshold, "a number > 0")
        return dataclasses.replace(self, threshold=threshold)

    def parameters(self, dims):
        """The network, c = 0.1 and L."""
        assert self.threshold is not None
        normal = jax.nn.initializers.normal
        zeros, constant = jax.nn.initializers.zeros, jax.nn.initializers.constant
        width, heads = self.width, dims.num_heads
        return {
            "w_in": Parameter((width,), normal(1.0), (None,)),
            "b_in": Parameter((width,), normal(1.0), (None,)),
            "w_out": Parameter((heads, width), normal(width**-0.5), ("heads", None)),
            "b_out": Parameter((heads,), zeros, ("heads",)),
            "c": Parameter((), constant(0.1), ()),
            "threshold": Parameter((), constant(self.threshold), ()),
        }

    def head_parameters(self, params, num_heads):
        """Each head's view of the network: the shared input layer beside its own output row."""
        p = {n: v.astype(jnp.float32) for n, v in params.items()}
        shared = {
            n: jnp.broadcast_to(p[n], (num_heads, *p[n].shape))
            for n in ("w_in", "b_in", "c", "threshold")
        }
        return shared | {"w_out": p["w_out"], "b_out": p["b_out"]}

    def bias(self, head, distance, q_positions):
        """f of the normalised distance; a future key counts as distance 0."""
        x = numerator(head, distance) / denominator(head, q_positions)

        def unit(total, weights):
            w_in, b_in, w_out = weights
            return total + w_out * jax.nn.relu(w_in * x + b_in), None

        # Unit by unit: a [T, S, width] array would be 32 tiles large.
        start = jnp.broadcast_to(head["b_out"], x.shape)
        return jax.lax.scan(unit, start, (head["w_in"], head["b_in"], head["w_out"]), unroll=4)[0]

    def network(self, heads, distance, q_positions):
        """For the flash kernels; all heads have the same input layer, c and L."""
        first = {name: heads[name][0] for name in ("w_in", "b_in", "c", "threshold")}
        return Fire(
            numerator(first, distance),
            1 / denominator(first, q_positions),
            first["w_in"],
            first["b_in"],
            heads["w_out"],
            heads["b_out"],
        )

"""The MLP of a block, gated or plain."""

from __future__ import annotations

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxlm.model.config import ModelConfig
from jaxlm.model.projection import Projection

# The function between the projections; gated kinds apply it to the gate.
ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "swiglu": jax.nn.silu,
    "geglu": functools.partial(jax.nn.gelu, approximate=False),
    "geglu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
}


# gpt-oss's (arXiv 2508.10925): the gate's sigmoid is steeper, and both halves are cut.
STEEPNESS, LIMIT = 1.702, 7.0


def clamped_swiglu(up: Float[Array, "*B F"], gate: Float[Array, "*B F"]) -> Float[Array, "*B F"]:
    """(up + 1) · gate · σ(1.702·gate), gate cut at 7, up at ±7."""
    gate, up = jnp.minimum(gate, LIMIT), jnp.clip(up, -LIMIT, LIMIT)
    return (up + 1) * gate * jax.nn.sigmoid(STEEPNESS * gate)


# The backward pass keeps the inputs alone: what lies between costs less than memory's way.
@functools.partial(jax.checkpoint, prevent_cse=False, static_argnums=0)
def activate(kind: str, up: Float[Array, "*B F"], gate: Float[Array, "*B F"] | None) -> Array:
    """activation(gate) · up, or activation(up)."""
    if gate is None:
        return ACTIVATIONS[kind](up)
    return clamped_swiglu(up, gate) if kind == "clamped_swiglu" else ACTIVATIONS[kind](gate) * up


class FeedForward(nn.Module):
    """down(activation(gate(x)) · up(x)), or down(activation(up(x)))."""

    config: ModelConfig
    d_ff: int

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """The MLP at every token."""
        c, f = self.config, self.config.feed_forward

        def project(name, inputs, outputs, axes, gain=1.0):
            return Projection((inputs,), (outputs,), axes, f.bias, c.param_dtype, gain, name=name)

        up = project("up", c.d_model, self.d_ff, ("embed", "mlp"))(x)
        gate = project("gate", c.d_model, self.d_ff, ("embed", "mlp"))(x) if f.gated else None
        gain = (2 * c.num_layers) ** -0.5
        down = project("down", self.d_ff, c.d_model, ("mlp", "embed"), gain)
        return down(activate(f.kind, up, gate))

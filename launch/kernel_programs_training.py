"""Our kernels of training, and what else does their jobs, as cases of launch.aot.

Each takes a mesh of one device and sizes; it returns a function and the shapes of its arguments.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxlm.training.objectives.next_token import LossSpec, next_token_loss
from kernels.cross_entropy import cross_entropy as kernel_cross_entropy
from launch.kernel_peers import Program, struct


def cross_entropy(mesh: Mesh, tokens: int, width: int, vocab: int, vocab_axis: int = 1) -> Program:
    """Loss and gradients of hidden states and matrix, bfloat16, by our kernel."""

    def loss(
        hidden: jax.Array, matrix: jax.Array, targets: jax.Array, weights: jax.Array
    ) -> jax.Array:
        losses = kernel_cross_entropy(hidden, matrix, None, targets, vocab_axis=vocab_axis)
        return (weights * losses.nll).sum()

    shape = (width, vocab) if vocab_axis == 1 else (vocab, width)
    integers, floats = (struct(mesh, tokens, dtype=t) for t in (jnp.int32, jnp.float32))
    arguments = [struct(mesh, tokens, width), struct(mesh, *shape), integers, floats]
    return jax.value_and_grad(loss, (0, 1)), arguments


def chunked_cross_entropy(mesh: Mesh, tokens: int, width: int, vocab: int, chunk: int) -> Program:
    """The same by XLA: jaxlm's scan over chunks of tokens, of one row."""

    def loss(
        hidden: jax.Array, matrix: jax.Array, targets: jax.Array, weights: jax.Array
    ) -> jax.Array:
        return next_token_loss(LossSpec(chunk), hidden, matrix, None, targets, weights)[0]

    integers, floats = (struct(mesh, 1, tokens, dtype=t) for t in (jnp.int32, jnp.float32))
    arguments = [struct(mesh, 1, tokens, width), struct(mesh, width, vocab), integers, floats]
    return jax.value_and_grad(loss, (0, 1)), arguments

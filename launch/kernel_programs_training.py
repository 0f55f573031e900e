"""Our kernels of training, and what else does their jobs, as cases of launch.aot.

Each takes a mesh of one device and sizes; it returns a function and the shapes of its arguments.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxlm.training.objectives.next_token import LossSpec, next_token_loss
from kernels import cross_entropy as ours
from kernels.chip import target_chip
from launch.kernel_peers import Program, struct


def cross_entropy(
    mesh: Mesh,
    tokens: int,
    width: int,
    vocab_blocks: float,
    backward: bool = False,
    dtype: str = "bfloat16",
) -> Program:
    """kernels.cross_entropy as training calls it: the losses, or the gradients of hidden states
    and matrix. V is 512 · vocab_blocks.
    """
    vocab = int(vocab_blocks * 512)

    def losses(hidden: jax.Array, matrix: jax.Array, targets: jax.Array) -> jax.Array:
        chip = target_chip() or "v5e"
        return ours.cross_entropy(hidden, matrix, None, targets, vocab_axis=1, chip=chip).nll

    def gradients(hidden: jax.Array, matrix: jax.Array, targets: jax.Array) -> Any:
        return jax.grad(lambda h, w: losses(h, w, targets).sum(), (0, 1))(hidden, matrix)

    arguments = [struct(mesh, tokens, width, dtype=dtype), struct(mesh, width, vocab, dtype=dtype)]
    arguments += [struct(mesh, tokens, dtype=jnp.int32)]
    return gradients if backward else losses, arguments


def chunked_cross_entropy(
    mesh: Mesh, tokens: int, width: int, vocab_blocks: float, chunk: int
) -> Program:
    """Loss and both gradients by XLA: jaxlm's scan over chunks of tokens, of one row."""
    vocab = int(vocab_blocks * 512)

    def loss(
        hidden: jax.Array, matrix: jax.Array, targets: jax.Array, weights: jax.Array
    ) -> jax.Array:
        return next_token_loss(LossSpec(chunk), hidden, matrix, None, targets, weights)[0]

    integers, floats = (struct(mesh, 1, tokens, dtype=t) for t in (jnp.int32, jnp.float32))
    arguments = [struct(mesh, 1, tokens, width), struct(mesh, width, vocab), integers, floats]
    return jax.value_and_grad(loss, (0, 1)), arguments

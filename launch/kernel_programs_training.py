"""Our kernels of training, and what else does their jobs, as cases of launch.aot.

Each takes a mesh of one device and sizes; it returns a function and the shapes of its arguments.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxlm.training.objectives.next_token import LossSpec, next_token_loss
from kernels.chip import target_chip
from kernels.cross_entropy.blocks import choose_blocks
from kernels.cross_entropy.call import Call
from kernels.cross_entropy.kernel import run_backward, run_forward
from launch.kernel_peers import Program, struct


def cross_entropy(
    mesh: Mesh, tokens: int, width: int, vocab_blocks: float, backward: bool
) -> Program:
    """One of kernels.cross_entropy's two kernels, as training runs them: the profiler aborts on the
    gather of the targets' columns that a whole gradient has. V is 512 · vocab_blocks.
    """
    vocab = int(vocab_blocks * 512)

    def run(hidden: Any, matrix: Any, bias: Any, targets: Any, *known: Any) -> list[jax.Array]:
        blocks = choose_blocks(tokens, width, vocab, 2, target_chip() or "v5e")
        call = Call(blocks, vocab, 1, None)
        if backward:
            return run_backward(call, hidden, matrix, bias, targets, *known)
        return run_forward(call, hidden, matrix, bias, targets, with_mean=True)

    column = struct(mesh, tokens, 1, dtype=jnp.float32)
    arguments = [struct(mesh, tokens, width), struct(mesh, width, vocab)]
    arguments += [struct(mesh, 1, vocab, dtype=jnp.float32)]
    arguments += [struct(mesh, tokens, 1, dtype=jnp.int32), *[column] * (3 if backward else 0)]
    return run, arguments


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

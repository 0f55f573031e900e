"""Final projection and softmax cross entropy on TPU, without the logits in HBM.

    losses = cross_entropy(hidden, params["head"], None, targets, vocab_axis=1)
    loss = (weights * (losses.nll + z_weight * losses.lse**2)).sum()

Differentiable in hidden, matrix and bias. A forward pass alone takes one matrix product, with
gradients four; see `forward` and `backward`.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from kernels.chip import chip_or_target
from kernels.cross_entropy.blocks import Blocks, choose_blocks
from kernels.cross_entropy.call import Call
from kernels.cross_entropy.kernel import losses
from kernels.cross_entropy.layout import lies_transposed
from kernels.precision import precision_of

__all__ = ["Blocks", "TokenLosses", "cross_entropy"]

DTYPES = (jnp.bfloat16, jnp.float32)


class TokenLosses(NamedTuple):
    """Of each token, [M].

    Attributes:
        nll: float32, -log p(target).
        lse: float32, log-sum-exp of the logits; a z-loss is a multiple of its square.
        correct: bool, the target's logit is the largest (or as large).
    """

    nll: jax.Array
    lse: jax.Array
    correct: jax.Array


def cross_entropy(
    hidden: jax.Array,
    matrix: jax.Array,
    bias: jax.Array | None,
    targets: jax.Array,
    *,
    vocab_axis: int,
    softcap: float | None = None,
    chip: str | None = None,
    blocks: Blocks | None = None,
) -> TokenLosses:
    """Losses of each token.

    On a TPU float32 is multiplied at jax's default precision, in one pass of bfloat16, unless
    `jax.default_matmul_precision("highest")` is set around the call: then in full, forward and
    backward, which takes four times as long.

    Args:
        hidden: [M, D], bfloat16 or float32.
        matrix: of hidden's dtype; [D, V], or [V, D] as tied embeddings are.
        bias: [V], any float dtype, or None.
        targets: [M] int32. One outside [0, V) is none: that token's nll is 0, and not correct.
        vocab_axis: of the matrix: 1 for [D, V], 0 for [V, D].
        softcap: logits become softcap·tanh(logits / softcap); None: they don't.
        chip: TPU generation, for the sizes of blocks; None: that which is traced for.
        blocks: sizes; None: the generation's.

    Returns:
        nll and lse, both differentiable, and correct.

    Raises:
        ValueError: shapes or dtypes that don't fit, an unknown chip; the text says what would do.
    """
    _check(hidden, matrix, bias, targets, vocab_axis)
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"softcap={softcap}; allowed: None or a finite number > 0")
    (tokens, width), vocab = hidden.shape, matrix.shape[vocab_axis]
    if lies_transposed(*matrix.shape):  # then its transpose is no copy, and it would be one
        matrix, vocab_axis = matrix.T, 1 - vocab_axis
    n = blocks or choose_blocks(tokens, width, vocab, hidden.dtype.itemsize, chip_or_target(chip))
    if n.rows % n.tile:
        raise ValueError(f"blocks={n}; allowed: rows that are a multiple of tile")
    call = Call(n, vocab, vocab_axis, softcap, precision_of(hidden.dtype))
    pad = -tokens % n.rows
    rows = jnp.pad(hidden, ((0, pad), (0, 0)))
    given = (targets >= 0) & (targets < vocab)
    ids = jnp.pad(jnp.where(given, targets, 0), (0, pad))[:, None]
    row = jnp.zeros(vocab, jnp.float32) if bias is None else bias.astype(jnp.float32)
    nll, lse, correct = (x[:tokens] for x in losses(call, rows, matrix, row[None], ids))
    return TokenLosses(jnp.where(given, nll, 0.0), lse, correct & given)


def _check(
    hidden: jax.Array, matrix: jax.Array, bias: jax.Array | None, targets: jax.Array, axis: int
) -> None:
    if axis not in (0, 1):
        raise ValueError(f"vocab_axis={axis}; allowed: 1 for a matrix [D, V], 0 for [V, D]")
    if hidden.ndim != 2 or 0 in hidden.shape:
        raise ValueError(f"hidden={hidden.shape}; allowed: [M, D], M ≥ 1, D ≥ 1")
    if hidden.dtype not in DTYPES:
        raise ValueError(f"hidden.dtype={hidden.dtype}; allowed: bfloat16, float32")
    tokens, width = hidden.shape
    if matrix.ndim != 2 or matrix.shape[1 - axis] != width or matrix.shape[axis] == 0:
        form = "[V, D]" if axis == 0 else "[D, V]"
        raise ValueError(f"matrix={matrix.shape}; allowed: {form} with D={width}, V ≥ 1")
    if matrix.dtype != hidden.dtype:
        raise ValueError(f"matrix.dtype={matrix.dtype}; allowed: hidden's, {hidden.dtype}")
    if targets.shape != (tokens,) or targets.dtype != jnp.int32:
        raise ValueError(f"targets={targets.dtype}{targets.shape}; allowed: int32 ({tokens},)")
    vocab = matrix.shape[axis]
    if bias is not None and (
        bias.shape != (vocab,) or not jnp.issubdtype(bias.dtype, jnp.floating)
    ):
        raise ValueError(f"bias={bias.dtype}{bias.shape}; allowed: float ({vocab},)")

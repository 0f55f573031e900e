"""The kernels' calls: grids, blocks in VMEM, and the gradient of the hidden states in between."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels.cross_entropy import backward, forward
from kernels.cross_entropy.call import LANES, Call
from kernels.cross_entropy.layout import entries

FLOAT = jnp.float32


def _matrix_spec(call: Call, width: int, at: Any) -> pl.BlockSpec:
    """`at`: grid position → vocabulary block."""
    n = call.blocks.vocab
    if call.vocab_axis == 1:
        return pl.BlockSpec((width, n), lambda *ids: (0, at(*ids)))
    return pl.BlockSpec((n, width), lambda *ids: (at(*ids), 0))


def _params(grid: tuple[int, int], call: Call) -> dict[str, Any]:
    params = pltpu.CompilerParams(
        dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=call.blocks.vmem_bytes
    )
    return {"grid": grid, "compiler_params": params}


def _cost(call: Call, products: int, passes: tuple[int, int], arrays: Any) -> pl.CostEstimate:
    """Of `products` matrix products; hidden and matrix are read as often as `passes` says."""
    hidden, matrix, *others = arrays
    tokens, width = hidden.shape
    read = passes[0] * _nbytes(hidden) + passes[1] * _nbytes(matrix)
    return pl.CostEstimate(
        flops=products * 2 * tokens * width * call.vocab,
        transcendentals=tokens * call.vocab * (1 if call.softcap is None else 2),
        bytes_accessed=read + sum(map(_nbytes, others)),
    )


def _nbytes(x: Any) -> int:
    return math.prod(x.shape) * x.dtype.itemsize


def run_forward(
    call: Call, hidden: Any, matrix: Any, bias: Any, targets: Any, with_mean: bool
) -> list[jax.Array]:
    """Log-sum-exp, target's logit, largest logit [1, M] float32; with_mean: the mean [M, D] too.

    hidden [M, D], M a multiple of the block of rows; bias [1, V] float32; targets [M, 1].
    """
    n, (tokens, width) = call.blocks, hidden.shape
    rows = pl.BlockSpec((n.rows, width), lambda i, j: (i, 0))
    lane = pl.BlockSpec((1, n.rows), lambda i, j: (0, i))
    out_shape = [jax.ShapeDtypeStruct((1, tokens), FLOAT)] * 3
    scratch = [pltpu.VMEM((n.rows, LANES), FLOAT)] * 3
    if with_mean:
        out_shape.append(jax.ShapeDtypeStruct(hidden.shape, hidden.dtype))
        scratch.append(pltpu.VMEM((n.rows, width), FLOAT))
    arrays = (hidden, matrix, bias, targets, *out_shape)
    return pl.pallas_call(
        functools.partial(forward.losses_and_mean if with_mean else forward.losses, call),
        in_specs=[
            rows,
            _matrix_spec(call, width, lambda i, j: j),
            pl.BlockSpec((1, n.vocab), lambda i, j: (0, j)),
            pl.BlockSpec((n.rows, 1), lambda i, j: (i, 0)),
        ],
        out_specs=[lane] * 3 + [rows] * with_mean,
        out_shape=out_shape,
        scratch_shapes=scratch,
        cost_estimate=_cost(call, 1 + with_mean, (1, tokens // n.rows), arrays),
        name="cross_entropy_forward",
        **_params((tokens // n.rows, call.num_vocab_blocks), call),
    )(hidden, matrix, bias, targets)


def run_backward(
    call: Call, hidden: Any, matrix: Any, bias: Any, targets: Any, lse: Any, g_nll: Any, g_lse: Any
) -> list[jax.Array]:
    """Gradients of the matrix, in its dtype, and of the bias, [1, V] float32.

    lse and the cotangents of nll and lse are [M, 1] float32.
    """
    n, (tokens, width) = call.blocks, hidden.shape
    column = pl.BlockSpec((n.rows, 1), lambda j, i: (i, 0))
    matrix_spec = _matrix_spec(call, width, lambda j, i: j)
    entry = pl.BlockSpec((1, n.vocab), lambda j, i: (0, j))
    out_shape = [
        jax.ShapeDtypeStruct(matrix.shape, matrix.dtype),
        jax.ShapeDtypeStruct(bias.shape, FLOAT),
    ]
    arrays = (hidden, matrix, bias, targets, lse, g_nll, g_lse, *out_shape)
    block = (width, n.vocab) if call.vocab_axis == 1 else (n.vocab, width)
    return pl.pallas_call(
        functools.partial(backward.kernel, call),
        in_specs=[
            pl.BlockSpec((n.rows, width), lambda j, i: (i, 0)),
            matrix_spec,
            entry,
            *[column] * 4,
        ],
        out_specs=[matrix_spec, entry],
        out_shape=out_shape,
        scratch_shapes=[pltpu.VMEM(block, FLOAT), pltpu.VMEM((1, n.vocab), FLOAT)],
        cost_estimate=_cost(call, 2, (call.num_vocab_blocks, 1), arrays),
        name="cross_entropy_backward",
        **_params((call.num_vocab_blocks, tokens // n.rows), call),
    )(hidden, matrix, bias, targets, lse, g_nll, g_lse)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def losses(call: Call, hidden: Any, matrix: Any, bias: Any, targets: Any) -> tuple[jax.Array, ...]:
    """nll, log-sum-exp and whether the target's logit is the largest, [M] each."""
    return _outputs(*run_forward(call, hidden, matrix, bias, targets, with_mean=False))


def _outputs(lse: jax.Array, picked: jax.Array, largest: jax.Array) -> tuple[jax.Array, ...]:
    return (lse - picked)[0], lse[0], (picked >= largest)[0]


def _forward(call: Call, hidden: Any, matrix: Any, bias: Any, targets: Any) -> Any:
    lse, picked, largest, mean = run_forward(call, hidden, matrix, bias, targets, with_mean=True)
    return _outputs(lse, picked, largest), (hidden, matrix, bias, targets, lse, picked, mean)


def _backward(call: Call, residuals: Any, cotangents: Any) -> Any:
    hidden, matrix, bias, targets, lse, picked, mean = residuals
    g_nll, g_lse, lse, picked = (x.reshape(-1, 1) for x in (*cotangents[:2], lse, picked))
    d_matrix, d_bias = run_backward(call, hidden, matrix, bias, targets, lse, g_nll, g_lse)
    # (g_nll + g_lse)·p - g_nll of the target, without the difference of two nearly equal numbers.
    d = g_nll * jnp.expm1(picked - lse) + g_lse * jnp.exp(picked - lse)
    target = entries(matrix, targets[:, 0], call.vocab_axis).astype(FLOAT)
    d_hidden = (g_nll + g_lse) * mean.astype(FLOAT) + d * call.slope(picked) * target
    return d_hidden.astype(hidden.dtype), d_matrix, d_bias, None


losses.defvjp(_forward, _backward)

"""Forward kernel: softmax over the vocabulary, one block of it at a time, as flash attention does.

    grid (row block i, vocabulary block j)

                  vocabulary, one block [D, vocab] in VMEM at a time
                 ┌──────┬──────┬──────┬──────┬──┐
    row block i  │ tile │ ···→ │      │      │  │   maximum, sum, target: [rows, 128]
    [rows, D]    │ tile │      │      │      │  │   Σ p·matrix: [rows, D] float32, in VMEM
                 └──────┴──────┴──────┴──────┴──┘

A gradient of hidden states is a mean of the matrix under the softmax, minus the target's column.
The mean is summed here, while the logits are at hand, with the running rescaling of flash attention
(values = keys = the matrix), so that backward needn't work them out once more for it: two matrix
products here and two in `backward`, where recomputing for each gradient would take five in all.

Letters: M tokens, D width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels.cross_entropy.call import HIDDEN, LANES, Call, columns


def _wide(x: jax.Array, width: int) -> jax.Array:
    """[rows, LANES] of equal lanes → [rows, width]."""
    return jnp.tile(x, (1, -(-width // LANES)))[:, :width]


def _kernel(call: Call, refs: tuple[Any, ...], mean_refs: tuple[Any, Any] | None) -> None:
    h, matrix, bias, targets, lse, picked, largest, top, total, target = refs
    j, n = pl.program_id(1), call.blocks

    @pl.when(j == 0)
    def start() -> None:
        top[...] = jnp.full_like(top, HIDDEN)
        total[...] = jnp.zeros_like(total)
        target[...] = jnp.zeros_like(target)
        if mean_refs is not None:
            mean_refs[1][...] = jnp.zeros_like(mean_refs[1])

    def block(last: bool) -> None:
        w = call.read(matrix, last)
        for row in range(0, n.rows, n.tile):
            at = pl.ds(row, n.tile)
            s = call.logits(h[at], w, bias[...], last)
            hit = columns(s) == targets[at] - j * n.vocab
            old = top[at]
            new = jnp.maximum(old, s.max(1, keepdims=True))
            p, shrink = jnp.exp(s - _wide(new, n.vocab)), jnp.exp(old - new)
            top[at] = new
            total[at] = total[at] * shrink + p.sum(1, keepdims=True)
            target[at] += jnp.where(hit, s, 0.0).sum(1, keepdims=True)
            if mean_refs is not None:
                acc = mean_refs[1]
                # Without the target: where p is nearly 1, its rounding would drown the difference
                # to 1 that the gradient is made of.
                share = jnp.where(hit, 0.0, p * call.slope(s)).astype(w.dtype)
                contract = (((1,), (call.vocab_axis,)), ((), ()))
                acc[at] = acc[at] * _wide(shrink, acc.shape[1]) + call.dot(share, w, contract)

    if call.tail:
        pl.when(j < call.num_vocab_blocks - 1)(lambda: block(False))
        pl.when(j == call.num_vocab_blocks - 1)(lambda: block(True))
    else:
        block(False)

    @pl.when(j == call.num_vocab_blocks - 1)
    def finish() -> None:
        lse[...] = (top[...] + jnp.log(total[...])).T[:1]
        picked[...] = target[...].T[:1]
        largest[...] = top[...].T[:1]
        if mean_refs is not None:
            mean, acc = mean_refs
            mean[...] = (acc[...] / _wide(total[...], acc.shape[1])).astype(mean.dtype)


def losses(call: Call, *refs: Any) -> None:
    """Log-sum-exp, the target's logit and the largest one."""
    _kernel(call, refs, None)


def losses_and_mean(call: Call, *refs: Any) -> None:
    """The same and Σ p·slope·matrix over all entries but the target."""
    h, matrix, bias, targets, lse, picked, largest, mean, top, total, target, acc = refs
    outputs, scratch = (lse, picked, largest), (top, total, target)
    _kernel(call, (h, matrix, bias, targets, *outputs, *scratch), (mean, acc))

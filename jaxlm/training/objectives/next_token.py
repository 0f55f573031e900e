"""Next-token cross entropy that never holds the logits of a whole batch."""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


@dataclasses.dataclass(frozen=True)
class LossSpec:
    """The static half of the loss.

    Attributes:
        chunk: positions of every row whose logits exist at one time, [batch, chunk, vocab].
        softcap: logits become cap·tanh(logits/cap); None: off.
        z_weight: of the mean squared log-sum-exp, which keeps logits from drifting (PaLM).
    """

    chunk: int = 64
    softcap: float | None = None
    z_weight: float = 0.0


class LossSums(NamedTuple):
    """Sums over the weighted targets, float32 scalars."""

    nll: Float[Array, ""]
    z: Float[Array, ""]
    correct: Float[Array, ""]


def _chunk_terms(spec: LossSpec, h, matrix, bias, targets):
    """Capped logits [B, C, V], their log-sum-exp and the target's logit [B, C], all float32."""
    raw = jnp.einsum("bcd,dv->bcv", h, matrix, preferred_element_type=jnp.float32)
    if bias is not None:
        raw = raw + bias.astype(jnp.float32)[None, None]
    logits = raw if spec.softcap is None else spec.softcap * jnp.tanh(raw / spec.softcap)
    lse = jax.nn.logsumexp(logits, axis=-1)
    picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return logits, lse, picked


def _sums(logits, lse, picked, targets, weights) -> LossSums:
    # The largest logit is at hand from the log-sum-exp; argmax would read them all once more.
    right = (picked >= logits.max(-1)).astype(jnp.float32)
    return LossSums(
        (weights * (lse - picked)).sum(), (weights * lse**2).sum(), (weights * right).sum()
    )


def _in_chunks(spec: LossSpec, hidden, targets, weights):
    """[B, T, …] → [chunks, B, C, …], the tail padded with weight 0.

    A chunk is every n-th position: tokens lie in parts over the devices of a context axis, so each
    chunk keeps all of them busy.
    """
    T = targets.shape[1]
    size = min(spec.chunk, T)
    pad = -T % size

    def cut(x):
        x = jnp.pad(x, ((0, 0), (0, pad)) + ((0, 0),) * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(x.shape[0], size, -1, *x.shape[2:]), 2, 0)

    return cut(hidden), cut(targets), cut(weights)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def next_token_loss(
    spec: LossSpec,
    hidden: Float[Array, "B T D"],
    matrix: Float[Array, "D V"],
    bias: Float[Array, "V"] | None,
    targets: Int[Array, "B T"],
    weights: Float[Array, "B T"],
) -> tuple[Float[Array, ""], LossSums]:
    """Σ weight·(-log p(target) + z_weight·lse²) over all positions, and its parts.

    Under differentiation the gradients are formed chunk by chunk in the forward pass, while the
    logits are at hand: three matrix products in all, where recomputing the logits would take four.

    Args:
        spec: the static half.
        hidden: last hidden states, in the compute dtype.
        matrix: of the output head, in the compute dtype.
        bias: of the output head, or None.
        targets: next tokens; any valid id where the weight is 0.
        weights: float32; 0 leaves a position out.

    Returns:
        The weighted sum, differentiable in hidden, matrix and bias, and `LossSums`, which are not.
    """

    def body(total, chunk):
        h, y, w = chunk
        logits, lse, picked = _chunk_terms(spec, h, matrix, bias, y)
        sums = _sums(logits, lse, picked, y, w)
        return jax.tree.map(jnp.add, total, sums), None

    zero = LossSums(*(jnp.zeros((), jnp.float32) for _ in LossSums._fields))
    sums, _ = jax.lax.scan(body, zero, _in_chunks(spec, hidden, targets, weights))
    return sums.nll + spec.z_weight * sums.z, sums


def _forward(spec, hidden, matrix, bias, targets, weights):
    def body(carry, chunk):
        total, d_matrix, d_bias = carry
        h, y, w = chunk
        logits, lse, picked = _chunk_terms(spec, h, matrix, bias, y)
        total = jax.tree.map(jnp.add, total, _sums(logits, lse, picked, y, w))
        p = jnp.exp(logits - lse[..., None])
        d = p * (w * (1 + 2 * spec.z_weight * lse))[..., None]
        hit = jnp.arange(logits.shape[-1])[None, None] == y[..., None]
        d = d - jnp.where(hit, w[..., None], 0.0)
        if spec.softcap is not None:
            d = d * (1 - (logits / spec.softcap) ** 2)
        if d_bias is not None:
            d_bias = d_bias + d.sum((0, 1))
        d = d.astype(h.dtype)
        d_h = jnp.einsum("bcv,dv->bcd", d, matrix)
        d_matrix = d_matrix + jnp.einsum("bcd,bcv->dv", h, d, preferred_element_type=jnp.float32)
        return (total, d_matrix, d_bias), d_h

    zero = LossSums(*(jnp.zeros((), jnp.float32) for _ in LossSums._fields))
    d_bias = None if bias is None else jnp.zeros(bias.shape, jnp.float32)
    start = (zero, jnp.zeros(matrix.shape, jnp.float32), d_bias)
    (sums, d_matrix, d_bias), d_hidden = jax.lax.scan(
        body, start, _in_chunks(spec, hidden, targets, weights)
    )
    B, T, D = hidden.shape
    d_hidden = jnp.moveaxis(d_hidden, 0, 2).reshape(B, -1, D)[:, :T]
    out = sums.nll + spec.z_weight * sums.z, sums
    # Cast here: residuals live until the backward pass.
    if bias is not None and d_bias is not None:
        d_bias = d_bias.astype(bias.dtype)
    return out, (d_hidden, d_matrix.astype(matrix.dtype), d_bias)


def _backward(spec, residuals, cotangents):
    del spec
    g, _ = cotangents
    scaled = jax.tree.map(lambda x: x * g.astype(x.dtype), residuals)
    return (*scaled, None, None)


next_token_loss.defvjp(_forward, _backward)

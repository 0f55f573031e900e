"""Small calls of the kernels of training and their oracles, gradients too."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.attention import mask as masks
from kernels import block_sampled_attention, cross_entropy
from kernels import flash_attention as flash
from kernels.block_sampled_attention import reference as sampled_reference
from kernels.cross_entropy import reference as entropy_reference
from kernels.flash_attention import reference as flash_reference
from launch.kernel_agreement_call import Agreement, Results, normal, with_gradients

# Interpreted, so for no chip of its own.
FLASH = functools.partial(flash.flash_attention, chip="v5e")
FLASH_AT = functools.partial(flash.flash_attention_at, chip="v5e")


def _alone(dtype: str, **options: Any) -> Results:
    """Causal, but for the options."""
    q, k = normal(1, 2, 200, 64, dtype=dtype), normal(1, 1, 200, 64, dtype=dtype)

    def of(function: Any) -> Any:
        return functools.partial(function, scale=0.125, **options)

    return with_gradients(of(FLASH), of(flash_reference.flash_attention), q, k, -k)


def _packed_bias(dtype: str) -> Results:
    q, k = normal(1, 2, 200, 64, dtype=dtype), normal(1, 1, 200, 64, dtype=dtype)
    ids = jnp.asarray(np.repeat([1, 2], [70, 130])[None], jnp.int32)

    def of(function: Any) -> Any:
        return lambda q, k, v, bias: function(q, k, v, ids, scale=0.125, window=90, bias=bias)

    kernel, oracle = of(FLASH), of(flash_reference.flash_attention)
    return with_gradients(kernel, oracle, q, k, -k, normal(2, 399))


def _lambda(dtype: str) -> Results:
    q, k = normal(1, 1, 300, 64, dtype=dtype), normal(1, 1, 300, 64, dtype=dtype)

    def of(function: Any) -> Any:
        def attend(q: jax.Array, k: jax.Array, v: jax.Array, q_far: jax.Array) -> Any:
            sinks = flash.Sinks(4, q_far, -k)
            return function(q, k, v, scale=0.125, window=128, sinks=sinks)

        return attend

    kernel, oracle = of(FLASH), of(flash_reference.flash_attention)
    return with_gradients(kernel, oracle, q, k, -k, -q)


def _fire(dtype: str) -> Results:
    """A network of 8 units with kinks where quotients are."""
    q, k = normal(1, 2, 200, 64, dtype=dtype), normal(1, 1, 200, 64, dtype=dtype)
    numerator = jnp.log1p(0.1 * jnp.maximum(jnp.arange(-199.0, 200), 0))
    reciprocal = 1 / jnp.log1p(0.1 * jnp.maximum(jnp.arange(200.0)[None], 50))
    slopes = normal(8)
    trained = slopes, -slopes * jnp.linspace(0.1, 0.9, 8), normal(2, 8), normal(2)

    def of(function: Any) -> Any:
        def attend(q: jax.Array, k: jax.Array, v: jax.Array, *network: jax.Array) -> Any:
            fire = flash.Fire(numerator, reciprocal, *network)
            return function(q, k, v, scale=0.125, fire=fire)

        return attend

    kernel, oracle = of(FLASH), of(flash_reference.flash_attention)
    return with_gradients(kernel, oracle, q, k, -k, *trained)


def _anywhere(dtype: str) -> Results:
    q, k = normal(1, 2, 200, 64, dtype=dtype), normal(1, 1, 200, 64, dtype=dtype)
    order = np.random.default_rng(0).permutation(200)
    at = flash.At(*(jnp.asarray(x, jnp.int32)[None] for x in (order, 1 + order // 150)))
    options = {"mask": masks.sliding_window(90), "scale": 0.125, "slopes": jnp.array([0.1, 0.02])}

    def of(function: Any) -> Any:
        return lambda q, k, v: function(q, k, v, at, at, **options)

    kernel, oracle = of(FLASH_AT), of(flash_reference.flash_attention_at)
    return with_gradients(kernel, oracle, q, k, -k)


def _sampled(dtype: str) -> Results:
    q, k = normal(1, 2, 500, 64, dtype=dtype), normal(1, 1, 500, 64, dtype=dtype)
    drawn = jnp.array([2, 3], jnp.int32), jnp.array([0.3, 0.1])
    sample = block_sampled_attention.Sample(*drawn, num_blocks=4)
    ids = jnp.asarray(np.repeat([1, 2], [100, 400])[None], jnp.int32)

    def of(function: Any) -> Any:
        options = {"scale": 0.125, "block": 128, "sink_blocks": 1}
        return lambda q, k, v: function(q, k, v, sample, ids, **options)

    kernel = of(block_sampled_attention.block_sampled_attention)
    return with_gradients(kernel, of(sampled_reference.block_sampled_attention), q, k, -k)


def _cross_entropy(dtype: str) -> Results:
    hidden, matrix = normal(24, 64, dtype=dtype), normal(64, 200, dtype=dtype)
    targets = jnp.arange(24, dtype=jnp.int32)

    def of(function: Any) -> Any:
        def losses(hidden: jax.Array, matrix: jax.Array, bias: jax.Array) -> Any:
            return function(hidden, matrix, bias, targets, vocab_axis=1, softcap=9.0)[:2]

        return losses

    kernel, oracle = of(cross_entropy.cross_entropy), of(entropy_reference.cross_entropy)
    return with_gradients(kernel, oracle, hidden, matrix, normal(200))


AGREEMENTS = (
    Agreement(
        "flash_attention", "causal, soft cap, gradients", functools.partial(_alone, softcap=4.0)
    ),
    Agreement("flash_attention", "packed, window, trained bias, gradients", _packed_bias),
    Agreement("flash_attention", "Λ: window, sinks, gradients", _lambda),
    Agreement("flash_attention", "prefix, gradients", functools.partial(_alone, prefix=50)),
    Agreement("flash_attention", "FIRE, gradients", _fire),
    Agreement("flash_attention", "tokens anywhere, window, slopes, gradients", _anywhere),
    Agreement("block_sampled_attention", "drawn blocks, sinks, packed, gradients", _sampled),
    Agreement("cross_entropy", "bias, soft cap, gradients", _cross_entropy),
)

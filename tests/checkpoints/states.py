"""States that are a pure function of the step, and their comparison byte by byte."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Moments(NamedTuple):
    mu: dict
    nu: dict


def state_at(step: int, width: int = 64) -> dict:
    """Everything a training state may hold: dtypes, nested containers, typed keys, numbers."""
    generator = np.random.default_rng(step)

    def weights(dtype):
        return jnp.asarray(generator.normal(size=(4, width)).astype(np.float32)).astype(dtype)

    return {
        "params": {
            "dense": {"kernel": weights(jnp.float32), "bias": jnp.zeros(width, jnp.bfloat16)},
            "minus_zero": jnp.full((3,), -0.0),
            "nan": jnp.asarray([np.nan, np.inf], jnp.float32),
        },
        "opt": (Moments({"k": weights(jnp.bfloat16)}, {"k": weights(jnp.float16)}), None, [3]),
        "quantized": weights(jnp.int8),
        "mask": weights(jnp.float32) > 0,
        "no_elements": jnp.zeros((0, 5)),
        "rng": jax.random.fold_in(jax.random.key(0), step),
        "keys": jax.random.split(jax.random.key(step, impl="rbg"), 2),
        "step": jnp.asarray(step, jnp.int32),
    }


def assert_same_bytes(left, right) -> None:
    """Equal structure, and in each leaf equal dtype, shape and bytes."""
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for a, b in zip(
        map(_stored, jax.tree.leaves(left)), map(_stored, jax.tree.leaves(right)), strict=True
    ):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert a.tobytes() == b.tobytes()


def _stored(leaf) -> np.ndarray:
    leaf = jnp.asarray(leaf)
    is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return np.asarray(jax.random.key_data(leaf) if is_key else leaf)

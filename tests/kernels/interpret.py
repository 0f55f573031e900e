"""How tests run kernels without a TPU: memory is NaN until written, copies land when waited for.

Where races are looked for two cores share the grid's parallel axes, as on v4, v5p and tpu7x.
"""

import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import tpu as pltpu

INTERPRET = pltpu.InterpretParams(uninitialized_memory="nan", dma_execution_mode="on_wait")
RACES = pltpu.InterpretParams(detect_races=True, num_cores_or_threads=2, uninitialized_memory="nan")


def random(rng, *shape, dtype=jnp.float32):
    return jnp.asarray(rng.normal(size=shape), dtype)


def assert_close(actual, expected, tolerance):
    """Absolute: numbers are weighed means of standard normals, so at most a few."""
    for a, b in zip(actual, expected, strict=True):
        np.testing.assert_allclose(np.asarray(a, np.float32), b, rtol=0, atol=tolerance)

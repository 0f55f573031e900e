"""How tests run kernels without a TPU: memory is NaN until written, copies land when waited for.

Where races are looked for two cores share the grid's parallel axes, as on v4, v5p and tpu7x.
"""

import contextlib
import io

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import tpu as pltpu

INTERPRET = pltpu.InterpretParams(uninitialized_memory="nan", dma_execution_mode="on_wait")
RACES = pltpu.InterpretParams(detect_races=True, num_cores_or_threads=2, uninitialized_memory="nan")
RACE = "RACE DETECTED"


def races(run, *arguments):
    """Whether a kernel races that `run(*arguments)` calls, all it returns waited for.

    The interpreter's own flag is of the last kernel that began, so this reads what it says: jax
    0.10 prints it and goes on, later ones raise it.
    """
    said = io.StringIO()
    with contextlib.redirect_stdout(said), pltpu.force_tpu_interpret_mode(RACES):
        try:
            jax.block_until_ready(run(*arguments))
        except jax.errors.JaxRuntimeError as error:
            if RACE not in str(error):
                raise
            return True
    return RACE in said.getvalue()


def random(rng, *shape, dtype=jnp.float32):
    return jnp.asarray(rng.normal(size=shape), dtype)


def assert_close(actual, expected, tolerance):
    """Absolute: numbers are weighed means of standard normals, so at most a few."""
    for a, b in zip(actual, expected, strict=True):
        np.testing.assert_allclose(np.asarray(a, np.float32), b, rtol=0, atol=tolerance)

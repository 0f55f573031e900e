"""That a kernel which races is found: without it, a test that finds no races shows nothing."""

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from tests.kernels.interpret import races


def share_a_sum(semantics, x):
    """All grid steps add to one block: right on one core, a race where cores share the grid."""

    def body(x, out):
        first = pl.program_id(0) == 0
        out[...] = jnp.where(first, x[...], out[...] + x[...])

    return pl.pallas_call(
        body,
        grid=(4,),
        in_specs=[pl.BlockSpec((8, 128), lambda i: (i, 0))],
        out_specs=pl.BlockSpec((8, 128), lambda i: (0, 0)),
        out_shape=jax.ShapeDtypeStruct((8, 128), x.dtype),
        compiler_params=pltpu.CompilerParams(dimension_semantics=(semantics,)),
    )(x)


def copy(waits, x):
    """Reads what a copy brings, after it or without waiting for it."""

    def body(x, out, scratch, done):
        brought = pltpu.make_async_copy(x, scratch, done)
        brought.start()
        if waits:
            brought.wait()
        out[...] = scratch[...]
        if not waits:
            brought.wait()

    return pl.pallas_call(
        body,
        in_specs=[pl.BlockSpec(memory_space=pl.ANY)],
        out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
        scratch_shapes=[pltpu.VMEM(x.shape, x.dtype), pltpu.SemaphoreType.DMA],
    )(x)


@pytest.mark.parametrize(
    ("kernel", "how", "found"),
    [
        (share_a_sum, "parallel", True),
        (share_a_sum, "arbitrary", False),
        (copy, False, True),
        (copy, True, False),
    ],
)
def test_races_are_found(kernel, how, found):
    x = jnp.ones((32, 128))
    assert races(kernel, how, x) == found


def test_a_race_is_found_before_another_kernel():
    def both(x):
        return share_a_sum("parallel", x), share_a_sum("arbitrary", x)

    assert races(both, jnp.ones((32, 128)))

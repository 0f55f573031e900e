"""What is computed in which precision."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from jaxlm.model.transformer import Transformer
from jaxlm.training.objectives.next_token import LossSpec
from jaxlm.training.step import loss_sums
from tests.model.configs import CONFIGS, logits, make, packed_rows, shapes

ROUNDING = {"bfloat16": 2.0**-9, "float16": 2.0**-11}
LOW = [n for n, c in CONFIGS.items() if c.numerics.dtype in ROUNDING]


def with_dtype(model, dtype):
    numerics = dataclasses.replace(model.config.numerics, dtype=dtype)
    return Transformer(model.config.replace(numerics=numerics))


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("base", "bfloat16"),
        ("base", "float16"),
        ("experts_shared", "bfloat16"),
        pytest.param("gemma_like", "bfloat16", marks=pytest.mark.slow),
    ],
)
def test_low_precision_is_close_to_float32(name, dtype):
    model, params = make(name)
    want = np.asarray(logits(model, params, *packed_rows()), np.float64)
    got = np.asarray(logits(with_dtype(model, dtype), params, *packed_rows()))
    assert got.dtype == np.float32
    error = np.sqrt(((got - want) ** 2).mean() / (want**2).mean())
    # A layer rounds about 25 times, each entry by at most `unit` relative: its seven matrices, and
    # its activations after norms, projections, rotations, softmax, gate and residuals. Independent
    # roundings add like the square root of their number. Norms pass errors on as they are; the
    # softmax multiplies them by the size of its scores, which here is about 2.
    unit = ROUNDING[dtype]
    assert error < 2 * unit * np.sqrt(25 * model.config.num_layers)
    assert error > unit / 4  # it really is computed in low precision


def loss_and_gradients(model, params):
    tokens, positions, segments = packed_rows()
    batch = {
        "tokens": tokens,
        "positions": positions,
        "segment_ids": segments,
        "targets": tokens,
        "loss_weights": (segments != 0).astype(jnp.float32),
    }

    def loss(p):
        return loss_sums(model, LossSpec(z_weight=1e-4), p, batch)[0]

    return jax.value_and_grad(loss)(params)


def equations(jaxpr):
    """Of a jaxpr and all jaxprs within."""
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in jaxprs_in_params(eqn.params):
            yield from equations(inner)


@pytest.mark.parametrize("name", [*LOW, "gemma_like", "experts"])
def test_norms_softmax_and_loss_are_float32(name):
    """No exponential, logarithm or root in low precision, forward or backward; but for the gate's
    own (`logistic`), the model has no other transcendental functions.
    """
    model, params = make(name)
    if name not in LOW:
        model = with_dtype(model, "bfloat16")
    jaxpr = jax.make_jaxpr(functools.partial(loss_and_gradients, model))(params).jaxpr
    found = set()
    for eqn in equations(jaxpr):
        kind = eqn.primitive.name
        if kind in ("exp", "exp2", "log", "rsqrt"):
            found.add(kind)
            assert eqn.outvars[0].aval.dtype == jnp.float32, eqn
    assert {"exp", "log", "rsqrt"} <= found


@pytest.mark.parametrize("name", CONFIGS)
def test_parameters_are_of_their_dtype(name):
    want = CONFIGS[name].param_dtype
    assert {x.dtype for x in jax.tree.leaves(shapes(name))} == {want}


@pytest.mark.parametrize("name", [*LOW, "experts_shared"])
def test_gradients_are_of_the_parameters_dtype(name):
    model, params = make(name)
    loss, gradients = jax.eval_shape(functools.partial(loss_and_gradients, model), params)
    assert loss.dtype == jnp.float32
    want = jax.tree.map(lambda x: (x.shape, x.dtype), params)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), gradients) == want

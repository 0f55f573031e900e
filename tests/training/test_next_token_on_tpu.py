"""The loss by TPU kernels, in TPU interpret mode, against XLA's form of it."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from jaxlm.sharding.mesh import MeshConfig, make_mesh
from jaxlm.training.objectives import next_token_on_tpu
from jaxlm.training.objectives.next_token import LossSpec, next_token_loss
from jaxlm.training.objectives.next_token_on_tpu import fits, next_token_loss_on_tpu
from tests.devices import on_devices


@pytest.fixture
def on_tpu(monkeypatch):
    """As traced for a TPU, and run by its interpreter."""
    monkeypatch.setattr(next_token_on_tpu, "target_chip", lambda: "v5e")
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(uninitialized_memory="nan")):
        yield


@pytest.mark.parametrize("tied", [False, True])
def test_it_agrees_with_the_form_of_xla(on_tpu, tied):
    """One device here; tests/training/test_loss_aot.py compiles for four."""
    keys = jax.random.split(jax.random.key(0), 4)
    hidden = jax.random.normal(keys[0], (2, 9, 64))
    matrix, bias = jax.random.normal(keys[1], (64, 200)), jax.random.normal(keys[2], (200,))
    targets = jax.random.randint(keys[3], (2, 9), 0, 200)
    weights = (jnp.arange(18, dtype=jnp.float32) % 3).reshape(2, 9)
    spec = LossSpec(chunk=4, softcap=3.0, z_weight=0.1)

    def run(loss):
        def both(*given):
            total, sums = loss(spec, *given, targets, weights)
            return 3 * total, sums  # the cotangent is not 1

        return jax.jit(jax.value_and_grad(both, (0, 1, 2), has_aux=True))(hidden, matrix, bias)

    def of_embedding(spec, hidden, matrix, *rest):
        return next_token_loss_on_tpu(spec, hidden, matrix.T, *rest, tied=True)

    with jax.set_mesh(make_mesh(MeshConfig())):
        assert fits(hidden)
        found = run(of_embedding if tied else next_token_loss_on_tpu)
    # float32 sums of 200 and 64 terms in another order.
    for a, b in zip(*map(jax.tree.leaves, (found, run(next_token_loss))), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=5e-6 * np.abs(b).max())


def test_each_device_gets_its_part_of_the_heads_gradient():
    printed = on_devices(4, "tests.training.loss_process")
    head = 16 * 50
    # (numbers in the largest sum that all get, sums of which each gets a part)
    wanted = {"data": (head, 0), "fsdp": (head / 4, 1)}
    wanted |= {"both": (head / 2, 1), "context": (head / 2, 1)}
    for name, found in json.loads(printed).items():
        assert tuple(found) == wanted[name.split()[0]], name


def test_what_the_kernels_do_not_take(on_tpu):
    assert not fits(jnp.zeros((1, 2, 64), jnp.float16))
    assert not fits(jnp.zeros((1, 2, 65536)))
    hidden, cut = jnp.zeros((1, 2, 64)), jax.sharding.AbstractMesh((1, 2), ("data", "tensor"))
    assert fits(hidden)
    with jax.sharding.use_abstract_mesh(cut):
        assert not fits(hidden)


def test_without_a_tpu():
    assert not fits(jnp.zeros((1, 2, 64)))

"""The train step against plain jax.grad of a full-logits loss, and what it promises besides."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlm.model.parameters import init_params
from jaxlm.training.config import OptimizerConfig, TrainConfig
from jaxlm.training.optimizers import make_optimizer
from jaxlm.training.state import init_state
from jaxlm.training.step import make_train_step
from tests.checkpoints.states import assert_same_bytes
from tests.marks import slow_but
from tests.training.cases import MODELS, make_batch, make_model

# Takes the gradient into its state and changes nothing.
recorder = optax.GradientTransformation(
    lambda params: jax.tree.map(jnp.zeros_like, params),
    lambda grads, state, params: (jax.tree.map(jnp.zeros_like, grads), grads),
)


def first_state(model, optimizer, config):
    """As one program."""
    return jax.jit(lambda: init_state(model, optimizer, config))()


@functools.cache
def recorded(name, microbatches):
    """A config, a state of a model of MODELS, and what a step makes of it with `make_batch()`."""
    config = TrainConfig(loss_chunk=4, z_weight=0.01, microbatches=microbatches)
    model = make_model(name)
    state = first_state(model, recorder, config)
    return config, state, jax.jit(make_train_step(model, recorder, config))(state, make_batch())


def full_loss(model, params, batch, z_weight, microbatches=1, key=None):
    """Mean cross entropy from all logits at once, plus z-loss, plus the experts' losses.

    The experts' losses are not sums over tokens: they are the mean over the microbatches (every
    m-th row) of each one's own, so they alone depend on how a batch is cut.
    """
    inputs = (batch["tokens"], batch["positions"], batch["segment_ids"])
    rngs = None if key is None else {"dropout": key}
    logits, _ = model.apply({"params": params}, *inputs, rngs=rngs)
    w = batch["loss_weights"]
    lse = jax.nn.logsumexp(logits, -1)
    nll = optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"])
    loss = (nll * w).sum() / w.sum()
    experts = 0.0
    if model.config.moe:
        parts = [jnp.stack([x[i::microbatches] for i in range(microbatches)]) for x in inputs]

        def router_losses(part):
            _, sown = model.apply({"params": params}, *part, mutable=["losses"])
            return sum(x.sum() for x in jax.tree.leaves(sown))

        experts = jax.lax.map(router_losses, parts).mean()
    total = loss + z_weight * (lse**2 * w).sum() / w.sum() + experts
    right = jnp.where(logits.argmax(-1) == batch["targets"], w, 0.0).sum() / w.sum()
    return total, {"loss": loss, "accuracy": right, "z": (lse**2 * w).sum() / w.sum()}


def assert_close(actual, expected, bound):
    """Each leaf within `bound` of the leaf's largest value."""
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=bound * np.abs(b).max(), rtol=0),
        actual,
        expected,
    )


@pytest.mark.parametrize(
    ("name", "microbatches"),
    slow_but(
        [("plain", 1), ("tied", 4)],
        [("plain", 1), *((name, 4) for name in MODELS)],
    ),
)
def test_loss_and_gradients_are_those_of_full_logits(name, microbatches):
    model, batch = make_model(name), make_batch()
    config, state, (new, metrics) = recorded(name, microbatches)
    (_, expected), grads = jax.jit(
        jax.value_and_grad(
            lambda p: full_loss(model, p, batch, config.z_weight, microbatches), has_aux=True
        )
    )(state.params)
    # Float32 sums in another order.
    assert_close(new.optimizer, grads, 2e-5)
    assert_close({k: metrics[k] for k in expected}, expected, 1e-5)
    norm = np.sqrt(sum((np.asarray(x) ** 2).sum() for x in jax.tree.leaves(grads)))
    np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-5)
    assert metrics["targets"] == batch["loss_weights"].sum()
    assert ("expert_losses" in metrics) == (name == "experts")
    assert_same_bytes(new.params, state.params)


def test_microbatches_of_one_size_or_another_are_one_update():
    """One of gradient descent at a rate of 1."""

    def after(microbatches):
        _, state, (new, _) = recorded("plain", microbatches)
        return jax.tree.map(lambda p, g: np.asarray(p) - np.asarray(g), state.params, new.optimizer)

    # Float32 sums in another order.
    assert_close(after(4), after(1), 1e-6)


def test_dropout_is_a_function_of_seed_step_and_microbatch():
    model, batch = make_model(dropout=0.3, num_layers=1), make_batch(rows=1)

    def gradient(config, batch, *steps):
        step = jax.jit(make_train_step(model, recorder, config))
        state = first_state(model, recorder, config)
        states = [dataclasses.replace(state, step=np.int32(n)) for n in steps]
        return [step(s, batch)[0].optimizer for s in states]

    params = init_params(model, 7)
    plain = jax.jit(jax.grad(lambda p, key: full_loss(model, p, batch, 0.0, key=key)[0]))
    expected = {step: plain(params, jax.random.fold_in(jax.random.key(7), step)) for step in (3, 4)}
    config = TrainConfig(seed=7, loss_chunk=4)
    first, later = gradient(config, batch, 3, 4)
    assert_close(first, expected[3], 2e-5)
    assert_close(later, expected[4], 2e-5)
    assert not np.allclose(first["embedding"], later["embedding"], rtol=1e-2)
    # The same row in two microbatches, each of which draws for itself.
    twice = {k: np.concatenate([v, v]) for k, v in batch.items()}
    (both,) = gradient(dataclasses.replace(config, microbatches=2), twice, 3)
    key = jax.random.fold_in(jax.random.key(7), 3)
    parts = [jax.device_get(plain(params, jax.random.fold_in(key, i))) for i in range(2)]
    assert_close(both, jax.tree.map(lambda x, y: (x + y) / 2, *parts), 2e-5)
    assert not np.allclose(parts[0]["embedding"], parts[1]["embedding"], rtol=1e-2)


@pytest.fixture(scope="module")
def skipping():
    """A jitted adamw step with EMA, its first state and the state after one good step."""
    model = make_model()
    config = TrainConfig(
        steps=20,
        loss_chunk=4,
        ema_decay=0.5,
        optimizer=OptimizerConfig(warmup_steps=10),
    )
    optimizer = make_optimizer(config.optimizer, config.steps)
    step = jax.jit(make_train_step(model, optimizer, config))
    return config, step, first_state(model, optimizer, config)


def poisoned(value):
    batch = make_batch()
    weights = np.array(batch["loss_weights"])
    weights[0, 0] = value
    return {**batch, "loss_weights": weights}


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_bad_step_changes_counters_only(skipping, value):
    config, step, first = skipping
    good, _ = step(first, make_batch())
    state, metrics = step(good, poisoned(value))
    assert not np.isfinite(metrics["loss"])
    for name in ("params", "optimizer", "ema"):
        assert_same_bytes(getattr(state, name), getattr(good, name))
    assert state.step == 2 and state.bad_steps.tolist() == [1, 1]
    state, metrics = step(state, poisoned(value))
    assert state.bad_steps.tolist() == [2, 2]
    assert (metrics["bad_steps"], metrics["bad_in_a_row"]) == (2, 2)
    state, metrics = step(state, make_batch())
    assert state.step == 4 and state.bad_steps.tolist() == [2, 0]
    assert np.isfinite(metrics["loss"])
    # The rate is that of the second step that was taken, and it is the one reported.
    rate = config.optimizer.learning_rate / 10
    np.testing.assert_allclose(metrics["learning_rate"], rate, rtol=1e-6)  # float32
    # As if the bad steps had never been (no dropout here, so the step's number has no say).
    as_if, _ = step(good, make_batch())
    assert_same_bytes(state.params, as_if.params)


def test_a_parameter_that_is_not_finite_stops_all(skipping):
    _, step, first = skipping
    embedding = np.array(first.params["embedding"])
    embedding[:, 0] = np.inf
    params = {**first.params, "embedding": embedding}
    state = type(first)(first.step, params, first.optimizer, first.ema, first.bad_steps)
    after, _ = step(state, make_batch())
    assert_same_bytes(after.params, params)
    assert after.bad_steps.tolist() == [1, 1]


def test_ema_against_a_loop_by_hand(skipping):
    config, step, state = skipping
    average = jax.tree.map(lambda p: np.asarray(p, np.float64), state.params)
    for n in range(12):
        state, _ = step(state, make_batch(n))
        d = min(config.ema_decay, (1 + n) / (10 + n))  # reaches the decay of ½ at n = 8
        average = jax.tree.map(
            lambda e, p, d=d: d * e + (1 - d) * np.asarray(p, np.float64), average, state.params
        )
    # Two products and a sum in float32, twelve times, the older errors halved.
    jax.tree.map(
        lambda e, a: np.testing.assert_allclose(e, a, rtol=1e-6, atol=1e-7), state.ema, average
    )


def test_a_batch_without_targets_does_nothing_bad(skipping):
    _, step, first = skipping
    batch = make_batch()
    empty = {**batch, "loss_weights": np.zeros_like(batch["loss_weights"])}
    state, metrics = step(first, empty)
    assert metrics["loss"] == 0 and metrics["grad_norm"] == 0
    assert state.bad_steps.tolist() == [0, 0]

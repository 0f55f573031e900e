"""Every optimizer against its formula in NumPy float64, every schedule against values by hand."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlm.checkpoints import Saver, restore
from jaxlm.model.parameters import abstract_params, placed_params
from jaxlm.sharding.mesh import MeshConfig, make_mesh
from jaxlm.training.config import OPTIMIZERS, SCHEDULES, OptimizerConfig, TrainConfig
from jaxlm.training.optimizers import decayed, learning_rate, make_optimizer, muon_dimensions
from jaxlm.training.state import abstract_state, init_state
from jaxlm.training.step import make_train_step
from tests.checkpoints.states import assert_same_bytes
from tests.marks import slow_but
from tests.training.cases import make_batch, make_model

STEPS, WARMUP, PEAK, END = 100, 10, 0.5, 0.1

# What follows the warm-up, as a function of the share of the rest that has passed.
AFTER_WARMUP = {
    "cosine": lambda x: PEAK * (END + (1 - END) * (1 + math.cos(math.pi * x)) / 2),
    "linear": lambda x: PEAK * (1 - (1 - END) * x),
    # The last 20 steps of 100, the last 2/9 of the 90 after the warm-up.
    "wsd": lambda x: PEAK * (1 - (1 - END) * max(0.0, x * 90 - 70) / 20),
    "rsqrt": lambda x: PEAK * math.sqrt(WARMUP / (WARMUP + x * 90)),
    "constant": lambda x: PEAK,
}


def schedule_config(name, **changes):
    values = {"warmup_steps": WARMUP, "end_fraction": END, "decay_fraction": 0.2, **changes}
    return OptimizerConfig(learning_rate=PEAK, schedule=name, **values)


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedule(name):
    schedule = learning_rate(schedule_config(name), STEPS)
    for step in (0, 1, 5, 9, 10, 11, 55, 79, 80, 81, 90, 99, 100):
        share = (step - WARMUP) / (STEPS - WARMUP)
        expected = PEAK * step / WARMUP if step < WARMUP else AFTER_WARMUP[name](share)
        np.testing.assert_allclose(schedule(jnp.int32(step)), expected, rtol=1e-5)  # float32


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize(("steps", "warmup"), [(5, 10), (1, 0), (100, 0), (20, 15)])
def test_odd_lengths(name, steps, warmup):
    """From the peak when the warm-up ends, never past it, to the end that a schedule decays to."""
    schedule = learning_rate(schedule_config(name, warmup_steps=warmup, decay_fraction=1.0), steps)
    rates = [float(schedule(jnp.int32(s))) for s in range(steps + 1)]
    assert all(0 <= r <= PEAK * (1 + 1e-6) for r in rates)
    if warmup < steps:
        assert rates[warmup] == pytest.approx(PEAK)
    if name in ("cosine", "linear", "wsd") and warmup < steps:
        assert rates[-1] == pytest.approx(PEAK * END, rel=1e-5)


# ---------------------------------------------------------------- formulas

B1, B2, EPSILON, DECAY = 0.8, 0.9, 1e-6, 0.3


def adamw(g, s, t):
    m = B1 * s.get("m", 0) + (1 - B1) * g
    v = B2 * s.get("v", 0) + (1 - B2) * g**2
    s.update(m=m, v=v)
    return (m / (1 - B1**t)) / (np.sqrt(v / (1 - B2**t)) + EPSILON)


def lion(g, s, t):
    direction = np.sign(B1 * s.get("m", 0) + (1 - B1) * g)
    s["m"] = B2 * s.get("m", 0) + (1 - B2) * g
    return direction


def sgd(g, s, t):
    s["m"] = B1 * s.get("m", 0) + g
    return s["m"]


def adafactor(g, s, t):
    """Shazeer & Stern 2018, algorithm 4 without parameter scaling; factored from width 128 on."""
    rate = 1 - t**-0.8
    square = g**2 + 1e-30
    if g.ndim >= 2 and min(sorted(g.shape)[-2:]) >= 128:
        s["r"] = rate * s.get("r", 0) + (1 - rate) * square.mean(-1)
        s["c"] = rate * s.get("c", 0) + (1 - rate) * square.mean(-2)
        v = s["r"][..., None] * s["c"][..., None, :] / s["r"].mean(-1)[..., None, None]
    else:
        v = s["v"] = rate * s.get("v", 0) + (1 - rate) * square
    u = g / np.sqrt(v)
    return u / max(1.0, np.sqrt((u**2).mean()))


def newton_schulz(x):
    """Jordan 2024: five steps of a quintic that pushes all singular values towards 1."""
    x = x.T if x.shape[0] > x.shape[1] else x
    y = x / (np.linalg.norm(x) + 1e-8)
    for _ in range(5):
        a = y @ y.T
        y = 3.4445 * y + (-4.775 * a + 2.0315 * a @ a) @ y
    return y


def muon(g, s, t):
    """Of one matrix: Nesterov momentum 0.95, orthogonalised, times √max(1, rows out / rows in)."""
    if g.ndim < 2:
        m = s["m"] = B1 * s.get("m", 0) + (1 - B1) * g
        v = s["v"] = B2 * s.get("v", 0) + (1 - B2) * g**2
        ahead = B1 * m / (1 - B1 ** (t + 1)) + (1 - B1) * g / (1 - B1**t)
        return ahead / (np.sqrt(v / (1 - B2**t)) + 1e-8)
    m = s["m"] = 0.95 * s.get("m", 0) + 0.05 * g
    ahead = 0.95 * m / (1 - 0.95 ** (t + 1)) + 0.05 * g / (1 - 0.95**t)
    y = newton_schulz(ahead)
    y = y.T if g.shape[0] > g.shape[1] else y
    return y * math.sqrt(max(1, g.shape[1] / g.shape[0]))


FORMULAS = {"adamw": adamw, "adafactor": adafactor, "lion": lion, "muon": muon, "sgd": sgd}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_formula(name):
    """Three steps, with warm-up, clipping that bites in the first, and decay of matrices only."""
    generator = np.random.default_rng(0)
    shapes = {
        "wide": {"kernel": (128, 130)},
        "small": {"kernel": (5, 3)},
        "norm": {"scale": (7,)},
        "position": {"slopes": (4,)},
    }
    params = jax.tree.map(
        lambda s: generator.normal(size=s).astype(np.float32),
        shapes,
        is_leaf=lambda x: isinstance(x, tuple),
    )
    config = OptimizerConfig(
        name=name,
        learning_rate=0.1,
        schedule="constant",
        warmup_steps=2,
        weight_decay=DECAY,
        b1=B1,
        b2=B2,
        epsilon=EPSILON,
        clip_norm=50.0,
    )
    optimizer = make_optimizer(config, 10)
    state = jax.jit(optimizer.init)(params)

    @jax.jit
    def step(grads, state, params):
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    expected = jax.tree.map(lambda p: np.asarray(p, np.float64), params)
    memory = jax.tree.map(lambda p: {}, expected)
    for t, (size, rate) in enumerate([(1.0, 0.0), (0.1, 0.05), (0.1, 0.1)], 1):
        grads = jax.tree.map(
            lambda p, s=size: (generator.normal(size=p.shape) * s).astype(np.float32), params
        )
        params, state = step(grads, state, params)
        norm = math.sqrt(
            sum((np.asarray(g, np.float64) ** 2).sum() for g in jax.tree.leaves(grads))
        )
        assert (norm > 50) == (t == 1)
        for layer, leaf in ((a, b) for a in shapes for b in shapes[a]):
            g = np.asarray(grads[layer][leaf], np.float64) * min(1, 50 / norm)
            u = FORMULAS[name](g, memory[layer][leaf], t)
            p = expected[layer][leaf]
            expected[layer][leaf] = p - rate * (u + DECAY * p * (leaf == "kernel"))
    # Float32; muon's five rounds of matrix products multiply the rounding by about a hundred.
    bound = 3e-4 if name == "muon" else 2e-5
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=bound), params, expected)


# ---------------------------------------------------------------- which parameters

EVERYTHING = {
    "attention": {"num_heads": 2, "qkv_bias": True, "out_bias": True, "sink_logits": True},
    "embedding": {"head_bias": True},
    "norm": {"kind": "layernorm", "bias": True},
    "position_encoding": "fire",
}


def names(tree):
    flat = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: x is None)
    return {jax.tree_util.keystr(p, simple=True, separator="/"): x for p, x in flat}


@pytest.mark.parametrize("kind", ["plain", "experts"])
def test_decay_is_for_matrices(kind):
    changes = dict(EVERYTHING)
    if kind == "plain":
        changes["feed_forward"] = {"d_ff": 24, "bias": True}
    model = make_model(kind, **changes)
    flags = names(decayed(abstract_params(model)))
    last = {name.rsplit("/", 1)[1] for name, on in flags.items() if on and "/" in name}
    assert last == {"kernel"} | ({"up", "gate", "down"} if kind == "experts" else set())
    assert flags["embedding"] and flags["head"] and not flags["head_bias"]
    assert any("position/" in name for name in flags)


@pytest.mark.parametrize("kind", ["plain", "experts"])
@pytest.mark.parametrize("scan", [True, False])
def test_muon_sees_each_matrix_of_a_layer_as_one(kind, scan):
    """Axes of layers and experts are batches; heads belong to the side they are computed on."""
    model = make_model(kind, **EVERYTHING, numerics={"scan_layers": scan})
    params = abstract_params(model)
    flat = jax.tree_util.tree_leaves_with_path(
        muon_dimensions(params),
        is_leaf=lambda x: x is None or isinstance(x, optax.contrib.MuonDimensionNumbers),
    )
    shapes = names(params)
    seen = set()
    for path, numbers in flat:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        shape = shapes[name].shape
        leaf, owner = (name.split("/")[-1], name.split("/")[-2] if "/" in name else "")
        if numbers is None:
            assert leaf not in ("kernel", "up", "gate", "down"), name
            continue
        rows = math.prod(shape[a] for a in numbers.reduction_axis)
        columns = math.prod(shape[a] for a in numbers.output_axis)
        experts, width = (4, 8) if leaf != "kernel" else (1, 8 if kind == "experts" else 24)
        expected = {
            "up": (16, width),
            "gate": (16, width),
            "down": (width, 16),
            "router": (16, 4),
        }.get(leaf if leaf != "kernel" else owner, (16, 16))
        assert (rows, columns) == expected, name
        assert math.prod(shape) == rows * columns * experts * (2 if scan else 1), name
        seen.add(owner if leaf == "kernel" else leaf)
    assert seen >= {"q", "k", "v", "out", "up", "gate", "down"}
    assert ("router" in seen) == (kind == "experts")


@pytest.mark.parametrize("kind", ["plain", "experts"])
def test_muon_on_stacked_layers_and_experts_is_muon_on_each_matrix(kind):
    model = make_model(kind)
    optimizer = make_optimizer(OptimizerConfig(name="muon", clip_norm=None, warmup_steps=0), 10)
    generator = np.random.default_rng(1)
    grads = jax.tree.map(
        lambda x: generator.normal(size=x.shape).astype(np.float32), abstract_params(model)
    )
    zeros = jax.tree.map(np.zeros_like, grads)
    update = jax.jit(lambda g, zeros: optimizer.update(g, optimizer.init(zeros), zeros)[0])
    updates = names(update(grads, zeros))
    for name, g in names(grads).items():
        leaf = name.split("/")[-1]
        if leaf not in ("kernel", "up", "gate", "down"):
            continue
        batch = 1 + (leaf != "kernel")  # layers, and experts
        split = batch + (2 if name.endswith("out/kernel") else 1)
        rows = math.prod(g.shape[batch:split])
        stacked = (-1, rows, math.prod(g.shape[split:]))
        for one, update in zip(
            np.asarray(g, np.float64).reshape(stacked),
            np.asarray(updates[name]).reshape(stacked),
            strict=True,
        ):
            np.testing.assert_allclose(update, -1e-3 * muon(one, {}, 1), atol=1e-6)


# ---------------------------------------------------------------- in use

RATES = {"adamw": 1e-2, "adafactor": 1e-2, "lion": 3e-3, "muon": 3e-2, "sgd": 0.1}


@pytest.mark.parametrize("name", slow_but(["adamw"], OPTIMIZERS))
def test_learns_and_its_state_comes_back_from_a_checkpoint(name, tmp_path):
    model, batch = make_model(), make_batch()
    config = TrainConfig(
        steps=30,
        loss_chunk=16,
        optimizer=OptimizerConfig(name=name, learning_rate=RATES[name], warmup_steps=3),
    )
    optimizer = make_optimizer(config.optimizer, config.steps)
    step = jax.jit(make_train_step(model, optimizer, config), donate_argnums=0)
    state, losses = jax.jit(lambda: init_state(model, optimizer, config))(), []
    for _ in range(config.steps):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.8 * losses[0]
    with Saver(tmp_path) as saver:
        saver.save(config.steps, state)
    mesh = make_mesh(MeshConfig())
    shapes = abstract_state(placed_params(model, mesh), optimizer, config, mesh)
    assert_same_bytes(restore(tmp_path, shapes).state, state)

"""Adapters: the paper's formulas, one matrix or two, what is learned and what is not."""

import functools
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.adapters.config import AdapterConfig
from jaxlm.adapters.lora import (
    adapted_shardings,
    add_adapters,
    is_learned,
    merge_adapters,
    targets,
)
from jaxlm.model.low_rank import adapted_kernel, add_low_rank
from jaxlm.model.parameters import init_params
from jaxlm.model.partition import combine, split
from jaxlm.model.transformer import Transformer
from tests.marks import slow_but
from tests.model.configs import EXPERTS, PATTERN, small

# A round of a pattern and one layer more; heads, biases; a router, shared experts.
MODEL = Transformer(
    small(
        num_layers=3,
        attention={"layer_pattern": PATTERN, "sliding_window": 4, "qkv_bias": True},
        moe={**EXPERTS, "num_shared_experts": 2},
    )
)
TOKENS = np.random.default_rng(0).integers(0, 29, (2, 9), np.int32)
EVERYWHERE = ".*"


@functools.cache
def adapted(dora, std=0.3):
    """Parameters, with a fresh adapter, and with one whose b is not zero."""
    config = AdapterConfig(rank=3, alpha=6.0, targets=EVERYWHERE, dora=dora)
    params = init_params(MODEL, 1)
    whole = jax.jit(lambda p: add_adapters(MODEL, p, config, seed=2))(params)

    def drawn(path, x):
        if path[-1].key not in ("b", "magnitude"):
            return x
        rng = np.random.default_rng(zlib.crc32(str(path).encode()))
        return jax.device_put(np.asarray(x) + std * rng.normal(size=x.shape).astype(np.float32))

    return params, whole, jax.tree_util.tree_map_with_path(drawn, whole)


merge = jax.jit(merge_adapters)


@jax.jit
def logits(params):
    return MODEL.apply({"params": params}, jnp.asarray(TOKENS))[0]


@pytest.mark.parametrize("dora", slow_but([False], [False, True]))
def test_a_fresh_adapter_changes_nothing_and_a_learned_one_can_be_merged(dora):
    params, fresh, learned = adapted(dora)
    plain = np.asarray(logits(params))
    # DoRA divides a length by itself: a rounding a layer.
    np.testing.assert_allclose(logits(fresh), plain, atol=1e-5 if dora else 0)
    changed = logits(learned)
    assert np.abs(changed - plain).max() > 0.1
    merged = merge(learned)
    assert jax.tree.structure(merged) == jax.tree.structure(params)
    # float32 sums in another order, through three layers.
    np.testing.assert_allclose(logits(merged), changed, atol=2e-4)


@pytest.mark.parametrize("dora", [False, True])
def test_a_merged_matrix_is_the_papers(dora):
    params, _, learned = adapted(dora)
    made = merge(learned)
    for name, n in (("q", 1), ("out", 2)):
        at = learned["layers"]["block_1"]["attention"][name]
        kernel = np.asarray(params["layers"]["block_1"]["attention"][name]["kernel"], np.float64)[0]
        a, b = (np.asarray(at["lora"][k], np.float64)[0] for k in ("a", "b"))
        inputs = int(np.prod(kernel.shape[:n]))
        matrix = kernel.reshape(inputs, -1)
        whole = matrix + 6.0 / 3 * a.reshape(inputs, 3) @ b.reshape(3, -1)
        if dora:
            magnitude = np.asarray(at["lora"]["magnitude"], np.float64)[0].reshape(-1)
            whole = magnitude * whole / np.linalg.norm(whole, axis=0)
        merged = np.asarray(made["layers"]["block_1"]["attention"][name]["kernel"])
        np.testing.assert_allclose(merged[0], whole.reshape(kernel.shape), rtol=1e-5, atol=1e-6)


def test_shardings_have_the_same_leaves():
    _, whole, _ = adapted(True)
    placed = adapted_shardings(MODEL, None, whole)
    assert jax.tree.structure(placed) == jax.tree.structure(whole)


def test_only_the_adapter_has_a_gradient_and_the_rest_costs_none():
    """The gradient of a frozen matrix, a third of the work, is not in the program."""
    model = Transformer(small(num_layers=1))
    config = AdapterConfig(rank=3, dora=True)
    params = jax.jit(lambda: add_adapters(model, init_params(model), config))()
    learned, frozen = split(params, is_learned)
    assert jax.tree.structure(combine(frozen, learned)) == jax.tree.structure(params)

    def loss(part, rest):
        logits, _ = model.apply({"params": combine(rest, part)}, jnp.asarray(TOKENS))
        return jnp.square(logits).mean()

    gradient = jax.jit(jax.grad(loss))

    def flops(part, rest):
        """As it is told to XLA, which may find more that is not needed."""
        return gradient.lower(part, rest).cost_analysis()["flops"]

    assert flops(learned, frozen) < 0.85 * flops(params, {})
    gradients = gradient(learned, frozen)["layers"]["block_0"]["attention"]["q"]["lora"]
    assert gradients.keys() == {"a", "b", "magnitude"}
    assert np.abs(gradients["b"]).max() > 0


def test_dora_learns_as_if_lengths_were_constants():
    """Section 4.3: the norm is held, so the gradient is magnitude / norm times LoRA's."""
    rng = np.random.default_rng(0)
    x, w, a, b, v = (
        rng.normal(size=shape).astype(np.float32)
        for shape in ((5, 4), (4, 6), (4, 2), (2, 6), (5, 6))
    )
    magnitude = rng.uniform(0.5, 1.5, 6).astype(np.float32)
    lora = {"a": a, "scale": np.float32(0.5), "magnitude": magnitude}

    def ours(b, x, w, lora):
        return (add_low_rank(x, x @ w, w, lora | {"b": b}, 1) * v).sum()

    norm = np.linalg.norm(w + 0.5 * a @ b, axis=0)
    theirs = (0.5 * x @ a).T @ (v * magnitude / norm)
    # float32 sums of 20 terms
    np.testing.assert_allclose(jax.jit(jax.grad(ours))(b, x, w, lora), theirs, rtol=1e-4, atol=1e-5)


def test_dora_leaves_a_column_of_zeros():
    """An output that is never used has no direction; its length can't be learned, but b can."""
    w = np.asarray([[1, 0], [2, 0]], np.float32)
    scale, magnitude = np.float32(2), np.asarray([3, 0], np.float32)
    lora = {"a": np.ones((2, 1), np.float32), "scale": scale, "magnitude": magnitude}

    @jax.jit
    def run(w, lora, b):
        def y(b):
            x = jnp.ones((1, 2))
            return add_low_rank(x, x @ w, w, lora | {"b": b}, 1)

        return y(b), adapted_kernel(w, lora | {"b": b}, 1), jax.grad(lambda b: y(b).sum())(b)

    y, kernel, gradient = run(w, lora, np.zeros((1, 2), np.float32))
    np.testing.assert_allclose(y, [[9 / np.sqrt(5), 0]], rtol=1e-6)
    np.testing.assert_allclose(kernel, 3 * w / np.sqrt(5), rtol=1e-6)
    assert np.isfinite(gradient).all()


def test_targets_are_names_within_a_layer():
    names = {t.name for t in targets(MODEL, AdapterConfig(rank=1, targets="attention/(q|v)"))}
    assert names == {"attention/q", "attention/v"}
    with pytest.raises(ValueError, match=r"targets='q_proj'; allowed: some of attention/k, "):
        targets(MODEL, AdapterConfig(rank=1, targets="q_proj"))


@pytest.mark.parametrize(
    ("field", "value"),
    [("rank", 0), ("alpha", 0.0), ("targets", "(")],
)
def test_bad_fields(field, value):
    with pytest.raises(ValueError, match=f"adapter: {field}="):
        AdapterConfig(**{"rank": 2, field: value})

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
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 29, (2, 9)))
EVERYWHERE = ".*"


@functools.cache
def adapted(dora, std=0.3):
    """Parameters, with a fresh adapter, and with one whose b is not zero."""
    config = AdapterConfig(rank=3, alpha=6.0, targets=EVERYWHERE, dora=dora)
    params = init_params(MODEL, 1)
    whole = add_adapters(MODEL, params, config, seed=2)

    def drawn(path, x):
        if path[-1].key not in ("b", "magnitude"):
            return x
        rng = np.random.default_rng(zlib.crc32(str(path).encode()))
        return jnp.asarray(np.asarray(x) + std * rng.normal(size=x.shape).astype(np.float32))

    return params, whole, jax.tree_util.tree_map_with_path(drawn, whole)


@jax.jit
def logits(params):
    return MODEL.apply({"params": params}, TOKENS)[0]


@pytest.mark.parametrize("dora", slow_but([False], [False, True]))
def test_a_fresh_adapter_changes_nothing_and_a_learned_one_can_be_merged(dora):
    params, fresh, learned = adapted(dora)
    plain = logits(params)
    # DoRA divides a length by itself: a rounding a layer.
    np.testing.assert_allclose(logits(fresh), plain, atol=1e-5 if dora else 0)
    changed = logits(learned)
    assert np.abs(changed - plain).max() > 0.1
    merged = jax.jit(merge_adapters)(learned)
    assert jax.tree.structure(merged) == jax.tree.structure(params)
    # float32 sums in another order, through three layers.
    np.testing.assert_allclose(logits(merged), changed, atol=2e-4)


@pytest.mark.parametrize("dora", [False, True])
def test_a_merged_matrix_is_the_papers(dora):
    params, _, learned = adapted(dora)
    for name, n in (("q", 1), ("out", 2)):
        at = learned["layers"]["block_1"]["attention"][name]
        kernel = np.asarray(params["layers"]["block_1"]["attention"][name]["kernel"][0], np.float64)
        a, b = (np.asarray(at["lora"][k][0], np.float64) for k in ("a", "b"))
        inputs = int(np.prod(kernel.shape[:n]))
        matrix = kernel.reshape(inputs, -1)
        whole = matrix + 6.0 / 3 * a.reshape(inputs, 3) @ b.reshape(3, -1)
        if dora:
            magnitude = np.asarray(at["lora"]["magnitude"][0], np.float64).reshape(-1)
            whole = magnitude * whole / np.linalg.norm(whole, axis=0)
        merged = merge_adapters(learned)["layers"]["block_1"]["attention"][name]["kernel"][0]
        np.testing.assert_allclose(merged, whole.reshape(kernel.shape), rtol=1e-5, atol=1e-6)


def test_shardings_have_the_same_leaves():
    _, whole, _ = adapted(True)
    placed = adapted_shardings(MODEL, None, whole)
    assert jax.tree.structure(placed) == jax.tree.structure(whole)


def test_only_the_adapter_has_a_gradient_and_the_rest_costs_none():
    """The gradient of a frozen matrix, a third of the work, is not in the program."""
    model = Transformer(small())
    params = add_adapters(model, init_params(model), AdapterConfig(rank=3, dora=True))
    learned, frozen = split(params, is_learned)
    assert jax.tree.structure(combine(frozen, learned)) == jax.tree.structure(params)

    def loss(part, rest):
        logits, _ = model.apply({"params": combine(rest, part)}, TOKENS)
        return jnp.square(logits).mean()

    def compiled(part, rest):
        return jax.jit(jax.grad(loss)).lower(part, rest).compile()

    ours, all_of_it = compiled(learned, frozen), compiled(params, {})
    assert ours.cost_analysis()["flops"] < 0.85 * all_of_it.cost_analysis()["flops"]
    gradients = ours(learned, frozen)["layers"]["block_0"]["attention"]["q"]["lora"]
    assert gradients.keys() == {"a", "b", "magnitude"}
    assert np.abs(gradients["b"]).max() > 0


def test_dora_learns_as_if_lengths_were_constants():
    """Section 4.3: the norm is held, so the gradient is magnitude / norm times LoRA's."""
    key = iter(jax.random.split(jax.random.key(0), 9))
    x, w = jax.random.normal(next(key), (5, 4)), jax.random.normal(next(key), (4, 6))
    lora = {
        "a": jax.random.normal(next(key), (4, 2)),
        "b": jax.random.normal(next(key), (2, 6)),
        "scale": jnp.asarray(0.5),
        "magnitude": jax.random.uniform(next(key), (6,)) + 0.5,
    }
    v = jax.random.normal(next(key), (5, 6))

    def ours(b):
        return (add_low_rank(x, x @ w, w, lora | {"b": b}, 1) * v).sum()

    norm = jnp.linalg.norm(w + 0.5 * lora["a"] @ lora["b"], axis=0)

    def theirs(b):
        return ((x @ w + 0.5 * x @ lora["a"] @ b) * (lora["magnitude"] / norm)[None] * v).sum()

    # float32 sums of 20 terms
    np.testing.assert_allclose(
        jax.grad(ours)(lora["b"]), jax.grad(theirs)(lora["b"]), rtol=1e-4, atol=1e-5
    )


def test_dora_leaves_a_column_of_zeros():
    """An output that is never used has no direction; its length can't be learned, but b can."""
    w = jnp.asarray([[1.0, 0.0], [2.0, 0.0]])
    lora = {"a": jnp.ones((2, 1)), "scale": jnp.asarray(2.0), "magnitude": jnp.asarray([3.0, 0.0])}

    x = jnp.ones((1, 2))

    def y(b):
        return add_low_rank(x, x @ w, w, lora | {"b": b}, 1)

    b = jnp.zeros((1, 2))
    np.testing.assert_allclose(y(b), [[9 / np.sqrt(5), 0]], rtol=1e-6)
    np.testing.assert_allclose(adapted_kernel(w, lora | {"b": b}, 1), 3 * w / np.sqrt(5), rtol=1e-6)
    assert np.isfinite(jax.grad(lambda b: y(b).sum())(b)).all()


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

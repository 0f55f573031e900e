"""No weight is above epsilon beyond the bound, and one that comes near it is just within."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.evaluation.alibi_scope import alibi_scope, reaching
from jaxlm.evaluation.retrieval_heads import weights
from jaxlm.model.config import AttentionConfig, ModelConfig, NormConfig
from jaxlm.model.parameters import abstract_params, init_params
from jaxlm.model.transformer import Transformer
from tests.marks import slow_but

T, EPSILON = 64, 1e-3


def config(**changes):
    return ModelConfig(
        vocab_size=32,
        num_layers=2,
        d_model=8,
        context_length=T,
        position_encoding="alibi(scale=100)",
        attention=AttentionConfig(num_heads=4, num_kv_heads=2, qkv_bias=True),
        norm=NormConfig(kind="layernorm", bias=True),
    ).replace(**changes)


def all_weights(spec, x):
    """A probe."""
    return weights(spec, x, jnp.arange(x.q.shape[1]))


@functools.partial(jax.jit, static_argnums=0)
def found(model, params, tokens, positions):
    """[layers, N, T, T] of one row."""
    given = (tokens, positions, jnp.ones_like(tokens))
    _, made = model.apply(
        {"params": params},
        *given,
        contiguous=False,
        method="hidden",
        probe=all_weights,
        mutable=["probes"],
    )
    return made["probes"]["layers"]["block_0"]["attention"]["found"][0][:, 0]


@pytest.mark.parametrize(
    "norm", slow_but([NormConfig()], [NormConfig(kind="layernorm", bias=True), NormConfig()])
)
def test_no_weight_is_larger_beyond_it(norm):
    """100 draws of all parameters."""
    model = Transformer(config(norm=norm))
    like = init_params(model)

    def draw(key):
        leaves, structure = jax.tree.flatten(like)
        keys = jax.random.split(key, len(leaves))
        pairs = zip(leaves, keys, strict=True)
        params = structure.unflatten([x + 0.3 * jax.random.normal(k, x.shape) for x, k in pairs])
        tokens = jax.random.randint(key, (1, T), 0, 32)
        return params, found(model, params, tokens, jnp.arange(T)[None])

    drawn = jax.jit(lambda key: jax.vmap(draw)(jax.random.split(key, 100)))
    params, p = jax.device_get(drawn(jax.random.key(0)))
    distance = np.arange(T)[:, None] - np.arange(T)[None]
    within = []
    for i in range(100):
        scope = alibi_scope(model.config, jax.tree.map(lambda x, i=i: x[i], params), EPSILON)
        beyond = distance >= scope[:, :, None, None]
        assert not (p[i] > EPSILON)[beyond].any()
        within.append(beyond.any((2, 3)).mean())
    assert np.mean(within) > 0.4  # of heads that saw anything beyond it at all


def test_it_is_no_larger_than_it_must_be():
    """Two tokens of opposite signs, whose logits are as far from each other as they can be."""
    bare = config(position_encoding="alibi", norm=NormConfig())
    model = Transformer(bare.replace(attention=AttentionConfig(num_heads=4, head_dim=2)))
    params = jax.tree.map(lambda x: np.zeros(x.shape, np.float32), abstract_params(model))
    params["embedding"][:2, 0] = [1, -1]
    block = params["layers"]["block_0"]
    block["attention_norm"]["scale"] += 1
    q, k = (block["attention"][name] for name in "qk")
    q["kernel"][:, 0, :, 0], k["kernel"][:, 0, :, 0] = 0.7, -0.7
    params = jax.device_put(params)
    scope = alibi_scope(model.config, params, EPSILON)
    slopes = np.array([2.0**-2, 2.0**-4, 2.0**-6, 2.0**-8])
    bound = 8 * 0.49 / math.sqrt(2)  # both are of norm √8
    np.testing.assert_allclose(scope, [(2 * bound - np.log(EPSILON)) / slopes] * 2)
    tokens = np.array([[1, 0]], np.int32)
    for head, at in np.ndenumerate(scope[0]):
        near, far = (
            np.asarray(found(model, params, tokens, np.array([[0, d]], np.int32)))[0, head[0], 1, 0]
            for d in (math.floor(at) - 1, math.ceil(at))
        )
        assert far <= EPSILON < near * 1.001  # beside it is a whole token: 1 + ε in all


def test_biases_are_a_row_of_the_matrices():
    model = Transformer(config())
    rng = np.random.default_rng(3)
    params = jax.tree.map(
        lambda x: jax.device_put(rng.normal(size=x.shape).astype(np.float32)),
        abstract_params(model),
    )
    block = jax.tree.map(lambda x: np.asarray(x, np.float64)[1], params["layers"]["block_0"])
    q, k = (
        np.append(block["attention"][n]["kernel"], [block["attention"][n]["bias"]], 0) for n in "qk"
    )
    norm = block["attention_norm"]
    radius = math.sqrt(8) * np.abs(norm["scale"]).max() + np.linalg.norm(norm["bias"])
    slopes = 100 * np.array([2.0**-2, 2.0**-4, 2.0**-6, 2.0**-8])
    for head, scope in enumerate(alibi_scope(model.config, params, EPSILON)[1]):
        product = np.linalg.norm(q[:, head] @ k[:, head // 2].T, 2)
        bound = product * (radius**2 + 1) / math.sqrt(2)  # a bias is a 1 that comes in too
        np.testing.assert_allclose(scope, (2 * bound - np.log(EPSILON)) / slopes[head])


def test_heads_that_reach_farther_than_a_window():
    scope = np.array([[5.0, 70, 9, 3], [80, np.inf, 64, 64]])
    assert reaching(scope, 64, config()) == ((0,), (0,))
    assert reaching(scope, 8, config()) == ((0, 1), (0, 1))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"position_encoding": "rope"}, "position_encoding='rope.*'; allowed: alibi"),
        ({"norm": NormConfig(placement="post")}, "placement='post'; allowed: pre, sandwich"),
        ({"norm": NormConfig(clip_qkv=3.0)}, "clip_qkv=3.0; allowed: None"),
        ({"attention": AttentionConfig(num_heads=4, qk_norm="head")}, "qk_norm='head'; allowed"),
    ],
)
def test_models_without_a_bound_are_told(changes, told):
    with pytest.raises(ValueError, match=told):
        alibi_scope(config(**changes), {})


def test_bad_parameters_and_settings_are_told():
    params = init_params(Transformer(config()))
    with pytest.raises(ValueError, match=r"epsilon=1.0; allowed: a number in \(0, 1\)"):
        alibi_scope(config(), params, 1.0)
    params["layers"]["block_0"]["attention"]["k"]["kernel_scale"] = jnp.ones((2, 1))
    with pytest.raises(ValueError, match="parameters of k: bias, kernel, kernel_scale; allowed"):
        alibi_scope(config(), params)
    loose = dataclasses.replace(config().attention, softcap=0.1)
    scope = alibi_scope(config(attention=loose), init_params(Transformer(config())), EPSILON)
    slopes = 100 * np.array([2.0**-2, 2.0**-4, 2.0**-6, 2.0**-8])
    np.testing.assert_allclose(scope, [(2 * 0.1 - np.log(EPSILON)) / slopes] * 2)

"""The model in float32 against the float64 NumPy oracle, for every option in the table."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.model.feed_forward import activate
from jaxlm.model.layouts import unroll_layers
from tests.marks import slow_but
from tests.model import oracle
from tests.model.configs import CONFIGS, VOCAB, float32_configs, make, packed_rows


def float64_params(config, params):
    """In the layout and precision of the oracle."""
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    return unroll_layers(config, params) if config.numerics.scan_layers else params


@functools.partial(jax.jit, static_argnums=(0, 5))
def logits_and_losses(model, params, tokens, positions, segments, contiguous=True):
    """Of the experts' losses, the sum over layers by name."""
    (y, _), sown = model.apply(
        {"params": params}, tokens, positions, segments, None, contiguous, mutable=["losses"]
    )
    losses = {"load_balance": 0.0, "router_z": 0.0}
    for path, x in jax.tree_util.tree_leaves_with_path(sown):
        name = next(k.key for k in path if getattr(k, "key", None) in losses)
        losses[name] += x.sum()
    return y, losses


def check(model, params, rows, contiguous=True):
    got, losses = logits_and_losses(model, params, *rows, contiguous)
    given = [oracle.Given(*row) for row in zip(*map(np.asarray, rows), strict=True)]
    want, (balance, z) = oracle.forward(model.config, float64_params(model.config, params), given)
    # float32 rounds at 6e-8. A logit passes some 30 roundings one after another (per layer two
    # norms, six products, a softmax), each of a sum of at most 128 terms, whose errors add like
    # their square root: 6e-8·√(30·128) = 4e-6 of the largest entry.
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * np.abs(want).max())
    np.testing.assert_allclose([losses["load_balance"], losses["router_z"]], [balance, z], 1e-5)


# Options alone, each of which a model that is kept has among others.
TWICE = {
    *("mha", "head_dim", "qkv_bias", "out_bias", "qk_norm_head", "softcap", "sliding", "pattern"),
    *("plain_bias", "parallel_separate", "experts", "experts_gated_bias", "layernorm_bias"),
    *("no_scale", "residual_norm", "sandwich_norm", "scale_plus_one", "tied", "embedding_scale"),
    *("head_transform", "tied_head_bias", "logit_softcap", "bidirectional", "learned"),
    "partial_rope",
}


@pytest.mark.parametrize("name", slow_but(set(float32_configs) - TWICE, float32_configs))
def test_model_is_the_oracle(name):
    check(*make(name), packed_rows())


@pytest.mark.parametrize("name", ["base", "alibi", "pattern", "sink_logits"])
def test_any_order_of_positions(name):
    """Tokens of two documents mixed, in no order: only positions and segments count."""
    tokens = packed_rows()[0]
    rng = np.random.default_rng(5)
    positions = np.stack([rng.permutation(13), rng.integers(0, 9, 13)]).astype(np.int32)
    segments = rng.integers(0, 3, (2, 13)).astype(np.int32)
    check(*make(name), (tokens, jnp.asarray(positions), jnp.asarray(segments)), False)


def test_clamped_swiglu_beyond_its_limits():
    """Which the small weights of the models above never reach."""
    up, gate = np.meshgrid(np.linspace(-12, 12, 9), np.linspace(-12, 12, 9))
    got = activate("clamped_swiglu", jnp.asarray(up, jnp.float32), jnp.asarray(gate, jnp.float32))
    # As an MLP of two inputs, up and gate themselves, and the output as it is.
    x, take = np.stack([up.ravel(), gate.ravel()], 1), np.eye(2)
    want = oracle.mlp("clamped_swiglu", x, (take[:, :1], 0), (take[:, 1:], 0), (np.eye(1), 0))
    # float32 rounding of a product of three.
    np.testing.assert_allclose(got.ravel(), want.ravel(), rtol=1e-6, atol=1e-6)


def test_defaults_are_positions_from_zero_in_one_segment():
    model, params = make("base")
    tokens = jnp.arange(26).reshape(2, 13) % VOCAB
    positions = jnp.broadcast_to(jnp.arange(13)[None], (2, 13))
    got, cache = jax.jit(lambda p: model.apply({"params": p}, tokens))(params)
    want, _ = logits_and_losses(model, params, tokens, positions, jnp.ones_like(tokens))
    assert cache is None
    # Two programs of one function: only the order of sums may differ. See `check`.
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)


def test_token_types():
    model, params = make("token_types")
    rows, types = packed_rows(), jnp.asarray(np.random.default_rng(3).integers(0, 3, (2, 13)))
    types = types.astype(jnp.int32)
    got, _ = model.apply({"params": params}, *rows, token_types=types)
    given = [oracle.Given(*row) for row in zip(*map(np.asarray, (*rows, types)), strict=True)]
    want, _ = oracle.forward(model.config, float64_params(model.config, params), given)
    # See `check`.
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * np.abs(want).max())


def test_experts_losses_count_real_tokens_only():
    """Padding changes neither loss."""
    model, params = make("experts_weights")
    tokens, positions, segments = packed_rows()
    other = jnp.where(segments == 0, 11, tokens)
    one = logits_and_losses(model, params, tokens, positions, segments)[1]
    two = logits_and_losses(model, params, other, positions, segments)[1]
    assert (tokens != other).any()
    assert jax.tree.all(jax.tree.map(np.array_equal, one, two))


def test_the_table_runs_in_float32_but_for_the_compute_dtypes():
    assert set(CONFIGS) - set(float32_configs) == {"bfloat16", "bfloat16_params", "float16"}

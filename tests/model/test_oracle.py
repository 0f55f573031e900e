"""The model in float32 against the float64 NumPy oracle, for every option in the table."""

import functools

import jax
import numpy as np
import pytest

from jaxlm.model.feed_forward import activate
from jaxlm.model.layouts import unroll_layers
from jaxlm.model.parameters import abstract_params
from jaxlm.model.transformer import Transformer
from tests.marks import slow_but
from tests.model import oracle
from tests.model.configs import (
    CONFIGS,
    EXPERTS,
    VOCAB,
    float32_configs,
    make,
    packed_rows,
    path_name,
    random_params,
    small,
)


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


# Several options in one model, whose program is compiled once.
TOGETHER = {
    "geglu_and_full": small(
        attention={"num_kv_heads": 1, "qk_norm": "full", "scale": 0.9},
        feed_forward={"kind": "geglu", "bias": True, "d_ff": None},
        norm={"kind": "layernorm", "epsilon": 0.3},
        embedding={"logit_scale": 0.3, "head_bias": True},
    ),
    "relu2_and_shared": small(
        attention={"qk_norm": "head", "out_bias": True},
        feed_forward={"kind": "relu2", "parallel": "shared"},
        norm={"kind": "layernorm", "scale": False, "bias": True, "clip_qkv": 0.6},
        position_encoding="nope",
    ),
    "gelu_tanh_and_post": small(
        attention={"qk_norm": "head"},
        feed_forward={"kind": "gelu_tanh"},
        norm={"kind": "layernorm", "bias": True, "placement": "post"},
        embedding={"norm": True, "scale": 5.5},
        position_encoding="learned(offset=2)",
    ),
    "relu_and_sandwich": small(
        feed_forward={"kind": "relu", "parallel": "separate"},
        norm={"placement": "sandwich"},
        position_encoding="alibi(scale=0.4)",
    ),
    "experts_and_shared": small(
        moe={**EXPERTS, "num_experts": 8, "top_k": 1, "d_ff": None, "num_shared_experts": 2},
        feed_forward={"kind": "gelu", "bias": True, "parallel": "shared"},
    ),
    "experts_and_gated_shared": small(
        moe={
            **EXPERTS,
            "normalize": False,
            "num_shared_experts": 1,
            "shared_d_ff": 40,
            "shared_gate": True,
        },
        attention={"layer_pattern": ("sliding", "global", "global"), "sliding_window": 3},
    ),
}
# Models of the table that have no option, but in their numbers, that none of these has.
IN_EVERY_RUN = {
    *("base", "reference", "blockwise", "block_sampled", "swiglu"),
    *("experts_weights", "gpt_oss_like", "gemma_like", "bert_like", "neox_like"),
    *("bidirectional_and_sliding", "two_sided_t5", "t5", "by_kind", "by_kind_rope"),
    *("unrolled", "remat_dots", "remat_full", "dropout"),
}


@pytest.mark.parametrize("name", slow_but(IN_EVERY_RUN, float32_configs))
def test_model_is_the_oracle(name):
    check(*make(name), packed_rows())


@pytest.mark.parametrize("name", TOGETHER)
def test_options_together(name):
    model = Transformer(TOGETHER[name])
    check(model, random_params(abstract_params(model)), packed_rows())


def options(config):
    """Fields and their values; of a number whether it is that of the smallest model."""
    plain, found = dict(fields(small())), set()
    for path, value in fields(config):
        if isinstance(value, int | float) and not isinstance(value, bool):
            found.add((path, value != plain.get(path)))
        else:
            found.add((path, str(value).partition("(")[0]))
    return found


def fields(config):
    """Paths and values, of lists each entry."""
    flat = jax.tree.leaves_with_path(config.to_dict(), is_leaf=lambda x: x is None)
    return [(path_name(path), value) for path, value in flat]


def test_every_run_has_every_option():
    kept = [*(CONFIGS[name] for name in IN_EVERY_RUN), *TOGETHER.values()]
    missing = set().union(*map(options, float32_configs.values()))
    assert not missing.difference(*map(options, kept))


@pytest.mark.parametrize("name", ["base", "alibi", "pattern", "sink_logits"])
def test_any_order_of_positions(name):
    """Tokens of two documents mixed, in no order: only positions and segments count."""
    tokens = packed_rows()[0]
    rng = np.random.default_rng(5)
    positions = np.stack([rng.permutation(13), rng.integers(0, 9, 13)]).astype(np.int32)
    segments = rng.integers(0, 3, (2, 13)).astype(np.int32)
    check(*make(name), (tokens, jax.device_put(positions), jax.device_put(segments)), False)


def test_clamped_swiglu_beyond_its_limits():
    """Which the small weights of the models above never reach."""
    up, gate = np.meshgrid(np.linspace(-12, 12, 9), np.linspace(-12, 12, 9))
    run = jax.jit(functools.partial(activate, "clamped_swiglu"))
    got = run(up.astype(np.float32), gate.astype(np.float32))
    # As an MLP of two inputs, up and gate themselves, and the output as it is.
    x, take = np.stack([up.ravel(), gate.ravel()], 1), np.eye(2)
    want = oracle.mlp("clamped_swiglu", x, (take[:, :1], 0), (take[:, 1:], 0), (np.eye(1), 0))
    # float32 rounding of a product of three.
    np.testing.assert_allclose(got.ravel(), want.ravel(), rtol=1e-6, atol=1e-6)


def test_defaults_are_positions_from_zero_in_one_segment():
    model, params = make("base")
    tokens = np.arange(26, dtype=np.int32).reshape(2, 13) % VOCAB
    positions = np.arange(26, dtype=np.int32).reshape(2, 13) % 13
    got, cache = jax.jit(lambda p, tokens: model.apply({"params": p}, tokens))(params, tokens)
    want, _ = logits_and_losses(model, params, tokens, positions, np.ones_like(tokens))
    assert cache is None
    # Two programs of one function: only the order of sums may differ. See `check`.
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)


def test_token_types():
    model, params = make("token_types")
    rows, types = packed_rows(), np.random.default_rng(3).integers(0, 3, (2, 13)).astype(np.int32)
    run = jax.jit(lambda p, *rows: model.apply({"params": p}, *rows[:3], token_types=rows[3])[0])
    got = run(params, *rows, types)
    given = [oracle.Given(*row) for row in zip(*map(np.asarray, (*rows, types)), strict=True)]
    want, _ = oracle.forward(model.config, float64_params(model.config, params), given)
    # See `check`.
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * np.abs(want).max())


def test_experts_losses_count_real_tokens_only():
    """Padding changes neither loss."""
    model, params = make("experts_weights")
    tokens, positions, segments = map(np.asarray, packed_rows())
    other = np.where(segments == 0, np.int32(11), tokens)
    one = logits_and_losses(model, params, tokens, positions, segments)[1]
    two = logits_and_losses(model, params, other, positions, segments)[1]
    assert (tokens != other).any()
    assert jax.tree.all(jax.tree.map(np.array_equal, one, two))


def test_the_table_runs_in_float32_but_for_the_compute_dtypes():
    assert set(CONFIGS) - set(float32_configs) == {"bfloat16", "bfloat16_params", "float16"}

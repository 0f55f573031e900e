"""What every registered encoding must hold; a new one is tested by being registered."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import positions
from jaxlm.caches.dense import DenseCache
from jaxlm.model.config import AttentionConfig, ModelConfig
from jaxlm.model.parameters import init_params
from jaxlm.model.transformer import Transformer
from tests.marks import slow_but

# Encodings whose defaults make no sense in a model this small, or that have variants of their own.
CASES = {name: name for name in positions.available()} | {
    "lm_infinite": "lm_infinite(window=6, num_sinks=2)",
    "lm_infinite_alibi": "lm_infinite(alibi, window=6, num_sinks=2)",
    "lm_infinite_nope": "lm_infinite(nope, window=6, num_sinks=2)",
    "lm_infinite_xpos": "lm_infinite(xpos, window=5, num_sinks=1, ceiling_distance=7)",
    "rope_partial": "rope(fraction=0.25)",
    "rope_interleaved": "rope(interleaved=True)",
    "rope_linear": "rope(scaling=linear(factor=2))",
    "rope_ntk": "rope(scaling=ntk(factor=2))",
    "rope_dynamic_ntk": "rope(scaling=dynamic_ntk(factor=2, original_length=8))",
    "rope_yarn": "rope(scaling=yarn(factor=2, original_length=8))",
    "rope_longrope": "rope(scaling=longrope(factor=2, original_length=8, short=(1, 1, 1, 1), "
    "long=(1, 2, 3, 4)))",
    "rope_llama3": "rope(scaling=llama3(factor=2, original_length=8))",
    "rope_alibi_multiplicative": "rope_alibi(kind=multiplicative, slopes=geometric)",
    "rope_alibi_linear": "rope_alibi(kind=linear)",
    "kerple_power": "kerple(kind=power)",
    "by_kind": "by_kind(sinusoidal, sliding=rope_alibi)",
    "by_kind_dynamic_ntk": "by_kind(rope(scaling=dynamic_ntk(factor=2, original_length=8)), "
    "sliding=rope(base=50))",
    "by_kind_learned": "by_kind(t5, sliding=lm_infinite(rope, window=3, num_sinks=1))",
}
LENGTH = 16
AT = np.tile(np.arange(LENGTH, dtype=np.int32), (2, 1))
# Every encoding; of settings that are not its first, those which turn pairs or scale scores in a
# way of their own.
IN_EVERY_RUN = [*positions.available(), "rope_interleaved", "rope_alibi_multiplicative"]


def bare(encoding):
    # Where the rotation depends on the context's length, deeper layers keep what they computed of a
    # shorter context: there cached decode equals the full forward in the first layer only. With two
    # kinds of layers that is the first global one, above a sliding one.
    two = encoding.startswith("by_kind")
    depends_on_length = not two and ("dynamic" in encoding or "longrope" in encoding)
    config = ModelConfig(
        vocab_size=40,
        num_layers=1 if depends_on_length else 2,
        d_model=32,
        context_length=LENGTH,
        position_encoding=encoding,
        attention=AttentionConfig(
            num_heads=4,
            num_kv_heads=2,
            layer_pattern=("sliding", "global") if two else ("global",),
            sliding_window=5 if two else None,
            implementation="reference",
        ),
    )
    return Transformer(config)


@functools.cache
def fresh(model):
    return init_params(model, 0)


@functools.cache
def make(encoding):
    model = bare(encoding)
    params = jax.tree.map(np.array, fresh(model))
    # Zero-initialised tables would make a learned bias invisible to every test.
    noise = np.random.default_rng(9).normal(size=64)
    for name, value in params.get("position", {}).items():
        extra = 0.3 * np.resize(noise, value.shape)
        params["position"][name] = (np.asarray(value) + extra).astype(value.dtype)
    return model, params


@functools.partial(jax.jit, static_argnums=0)
def logits(model, params, ids, at, segments):
    return model.apply({"params": params}, ids, at, segments)[0]


@functools.partial(jax.jit, static_argnums=0)
def step(model, params, ids, at, segments, cache):
    return model.apply({"params": params}, ids, at, segments, cache)


def tokens(batch=2, length=LENGTH):
    return np.random.default_rng(1).integers(0, 40, (batch, length), dtype=np.int32)


@pytest.mark.parametrize("case", CASES)
def test_text_form_round_trips(case):
    config = bare(CASES[case]).config
    assert positions.parse(str(config.encoding)) == config.encoding
    assert ModelConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize("case", slow_but(positions.available(), CASES))
def test_cached_decode_equals_full_forward(case):
    """Left-padded, two tokens at a time; at each step the full forward of that prefix."""
    model, params = make(CASES[case])
    ids, slots, pad = tokens(), AT, np.array([[0], [3]], np.int32)
    at, segments = np.maximum(slots - pad, 0), (slots >= pad).astype(np.int32)
    cache = DenseCache.init(model.config, 2, LENGTH)
    for start, stop in ((i, i + 2) for i in range(0, LENGTH, 2)):
        part = slice(start, stop)
        said, cache = step(model, params, ids[:, part], at[:, part], segments[:, part], cache)
        # One shape, one program: what comes later is padding. The context's length is that so far.
        there = (slots < stop).astype(np.int32)
        want = logits(model, params, ids, at * there, segments * there)
        got, want = np.asarray(said), np.asarray(want)[:, part]
        real = segments[:, part] == 1  # what padding says is nobody's
        # float32 rounding: sums over other shapes run in another order.
        np.testing.assert_allclose(got[real], want[real], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_rotated_keys_turn_back(case):
    encoding = bare(CASES[case]).config.encoding
    k = jnp.asarray(np.random.default_rng(2).normal(size=(1, LENGTH, 2, 8)), jnp.float32)
    rotation = encoding.rotation(jnp.arange(LENGTH)[None], jnp.full((1, 1), LENGTH), 8)
    back = encoding.unrotate_keys(encoding.rotate_keys(k, rotation), rotation)
    # float32 rounding, twice.
    np.testing.assert_allclose(back, k, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("case", slow_but(IN_EVERY_RUN, CASES))
def test_relative_encodings_see_only_differences(case):
    model, params = make(CASES[case])
    ids, at = tokens(), AT
    ones = np.ones_like(ids)
    shift = 37
    if model.config.encoding.max_length is not None:
        at, shift = at // 2, LENGTH // 2  # within its table
    encoding = model.config.encoding
    absolute_parts = "lm_infinite" in case or "dynamic" in case or "longrope" in case
    if absolute_parts:  # sinks and total length are absolute by design
        pytest.skip("not a function of differences alone")
    near = logits(model, params, ids, at, ones)
    far = logits(model, params, ids, at + shift, ones)
    if case == "nope":
        np.testing.assert_array_equal(near, far)
    elif encoding.relative:
        # angles of larger positions are rounded more coarsely: 37·2⁻²⁴ relative, over two layers
        np.testing.assert_allclose(near, far, rtol=2e-5, atol=2e-5)
    else:
        assert not np.allclose(near, far, atol=1e-3)


@pytest.mark.parametrize("case", slow_but(positions.available(), CASES))
def test_order_matters_and_gradients_are_finite(case):
    model, params = make(CASES[case])
    ids = tokens()
    ones, swapped = np.ones_like(ids), ids.copy()
    swapped[:, [-3, -2]] = ids[:, [-2, -3]]
    one, other = (np.asarray(logits(model, params, x, AT, ones))[:, -1] for x in (ids, swapped))
    assert np.abs(one - other).max() > 1e-4  # a hundred times float32's rounding

    period = len(model.config.attention.layer_pattern)
    shallow = Transformer(model.config.replace(num_layers=period))  # compiles twice as fast
    layers = jax.tree.map(lambda x: np.asarray(x)[:1], params["layers"])

    def loss(p, ids):
        y, _ = shallow.apply({"params": p}, ids)
        return jnp.mean(jax.nn.log_softmax(y)[..., 0] ** 2)

    gradients = jax.jit(jax.grad(loss))(params | {"layers": layers}, ids)
    for path, g in jax.tree_util.tree_leaves_with_path(gradients):
        assert np.isfinite(g).all(), path
        if path[0].key == "position":
            assert np.abs(g).max() > 0, path


@pytest.mark.parametrize("case", slow_but(positions.available(), CASES))
def test_swapping_leaves_shared_parameters_bit_identical(case):
    model = bare(CASES[case])
    base = fresh(Transformer(model.config.replace(position_encoding="nope")))
    other = fresh(model)
    shared = {n: v for n, v in other.items() if n != "position"}
    assert jax.tree.structure(shared) == jax.tree.structure(base)
    jax.tree.map(np.testing.assert_array_equal, shared, base)


def test_one_program_for_equal_configs():
    """Encodings are static by value: an equal one built anew compiles nothing."""
    ids, count = tokens(), 0

    def apply(model, params, ids):
        nonlocal count
        count += 1
        return model.apply({"params": params}, ids)[0]

    jitted = jax.jit(apply, static_argnums=0)
    for _ in range(3):
        model, params = make("lm_infinite(rope(base=500.0), window=5, num_sinks=1)")
        jitted(model, params, ids)
    assert count == 1

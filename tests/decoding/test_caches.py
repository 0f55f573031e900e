"""What every cache must do, each by its being registered."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import caches
from jaxlm.attention import mask as masks
from jaxlm.attention.inputs import AttentionInputs, AttentionSpec
from jaxlm.decoding.generate import generate
from tests.decoding import tiny
from tests.marks import slow_but

# As the registry's text forms; sizes at which a text of some 40 tokens goes round.
SETTINGS = {
    "dense": "dense",
    "paged": "paged(page=16)",
    "quantized": "quantized(full=16, group=16, num_sinks=1, window=24)",
    "razor": "razor(heads=((1,), (0,)), window=16, group=16, num_sinks=1)",
    "ring": "ring(window=8, num_sinks=2, slack=3)",
    "staircase": "staircase(full=16, steps=((8, 16), (2, None)), group=16, num_sinks=1)",
}
# Those that round what they keep, or average it: a prompt, whose tokens see each other as they are,
# is then more exact in one piece than in several. Their own tests: test_staircase, test_razor.
ROUNDED = ("quantized", "razor", "staircase")
LENGTH = 24


def test_each_kind_has_settings_here():
    assert set(SETTINGS) == set(caches.available())


@pytest.fixture(params=SETTINGS)
def kind(request):
    return caches.parse(SETTINGS[request.param])


def test_the_text_form_round_trips(kind):
    assert caches.parse(str(kind)) == kind


@jax.jit(static_argnames="model")
def step(model, params, tokens, positions, segment_ids, cache):
    return model.apply({"params": params}, tokens, positions, segment_ids, cache)


@jax.jit(static_argnames=("model", "kept"))
def in_one_piece(model, params, tokens, positions, segment_ids, kept):
    given = {"params": params}, tokens, positions, segment_ids
    hidden, _ = model.apply(*given, method="hidden", kept=kept)
    return model.apply({"params": params}, hidden, method="logits")


@pytest.mark.parametrize(("first", "then"), slow_but([(7, 4)], [(5, 1), (1, 1), (40, 1), (7, 4)]))
@pytest.mark.parametrize("cache", sorted(set(SETTINGS) - set(ROUNDED)))
def test_how_many_tokens_come_at_a_time_changes_nothing(cache, first, then):
    """As one model that sees what the cache keeps, read in one piece; rows of two lengths."""
    kind = caches.parse(SETTINGS[cache])
    model, params = tiny.model(), tiny.params()
    ids = np.random.default_rng(1).integers(model.config.vocab_size, size=(2, LENGTH), dtype="i4")
    lengths = np.array([LENGTH, LENGTH - 5])
    at = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), ids.shape)
    there = (at < lengths[:, None]).astype(np.int32)
    cache = kind.init(model.config, 2, 2 * LENGTH)
    want = in_one_piece(model, params, ids, at, there, cache.mask)
    got = []
    for start, stop in [(0, first), *((i, i + then) for i in range(first, LENGTH, then))]:
        part = slice(start, min(stop, LENGTH))
        logits, cache = step(model, params, ids[:, part], at[:, part], there[:, part], cache)
        got.append(logits)
    real = there != 0
    # float32 sums in another order, through softmaxes that tiny's large weights make sharp
    np.testing.assert_allclose(np.concatenate(got, 1)[real], want[real], rtol=0, atol=1e-3)
    np.testing.assert_array_equal(cache.lengths, lengths)


@pytest.mark.parametrize("rows", slow_but([[2, 0, 0, 1, 2]], [[2, 0, 0], [1], [2, 0, 0, 1, 2]]))
def test_rows_change_places(kind, rows):
    """And number: as if the same tokens had been written into those rows."""
    config, rows = tiny.model().config, np.array(rows, np.int32)
    shape = (config.num_layers, 3, 2, config.num_kv_heads, config.head_dim)
    k, v = np.random.default_rng(0).normal(size=(2, *shape)).astype(np.float32)
    after = reordered(committed(kind, k, v), rows)
    before = committed(kind, k[:, rows], v[:, rows])
    np.testing.assert_array_equal(after.lengths, before.lengths)
    for layer in range(config.num_layers):
        a, b = (attended(cache.layer(layer), len(rows)) for cache in (after, before))
        np.testing.assert_array_equal(a, b)


@jax.jit(static_argnums=0)
def committed(kind, k, v):
    """A cache of two tokens a row."""
    at = jnp.broadcast_to(jnp.arange(2)[None], k.shape[1:3])
    return kind.init(tiny.model().config, len(at), 8).commit((k, v), at, jnp.ones_like(at))


@jax.jit
def reordered(cache, rows):
    return cache.reorder(rows)


@jax.jit(static_argnums=1)
def attended(layer, batch):
    """What one token a row at position 2 makes of a layer."""
    config = tiny.model().config
    q, k, v = jax.random.normal(
        jax.random.key(1), (3, 1, 1, config.attention.num_heads, config.head_dim)
    )
    q, k, v = (jnp.repeat(x, batch, axis=0) for x in (q, *(x[:, :, ::2] for x in (k, v))))
    at = jnp.full((batch, 1), 2)
    spec = AttentionSpec(masks.causal(), scale=1.0)
    return layer.attend(spec, AttentionInputs(q, k, v, at, at, at // 2, at // 2))


def test_bytes_are_known_before_it_is_made(kind):
    config = tiny.model().config
    cache = kind.init(config, 3, 17)
    kept = [x for x in jax.tree.leaves(cache) if x.ndim > 2]
    assert cache.nbytes == kind.nbytes_of(config, 3, 17) == sum(x.nbytes for x in kept)


@pytest.mark.parametrize(
    ("cache", "told"),
    [
        ("rign(window=8)", "did you mean ring"),
        ("ring", "window missing"),
        ("ring(window=0)", "window=0; allowed"),
        ("ring(window=2147483648)", "window=2147483648; allowed: an integer up to 1073741824"),
        ("ring(window=8, num_sinks=-1)", "num_sinks=-1; allowed"),
        ("paged(page=24)", "page=24; allowed"),
        (
            "paged(page=16, pages=4)",
            "pages=4.*; allowed: one that holds 1 texts of up to 66 tokens",
        ),
    ],
)
def test_bad_settings_are_told(cache, told):
    with pytest.raises(ValueError, match=told):
        generate(tiny.model(), {}, tiny.TOKENIZER, ["a"], cache=cache)


def test_a_ring_says_what_a_model_with_its_mask_says():
    model, params = tiny.model(), tiny.params()
    ring = caches.parse("ring(window=8, num_sinks=2)")
    texts = ["it was the best of times", "no"]
    small = model.with_position_encoding("lm_infinite", window=8, num_sinks=2)
    dense, through = (
        generate(small, params, tiny.TOKENIZER, texts, 40, cache=cache) for cache in ("dense", ring)
    )
    assert dense == through


def test_padding_is_no_context():
    """To an encoding that looks at the context's length."""
    model = tiny.model("rope(scaling=dynamic_ntk(factor=4, original_length=8))")
    ids = np.random.default_rng(2).integers(model.config.vocab_size, size=(1, 32), dtype=np.int32)
    at, read = np.arange(32, dtype=np.int32)[None], 10
    there = (at < read).astype(np.int32)

    def logits(count):
        cache = caches.parse("dense").init(model.config, 1, 32)
        given = (ids[:, :count], at[:, :count], there[:, :count], cache)
        return step(model, tiny.params(), *given)[0][:, :read]

    # float32, in programs of two shapes
    np.testing.assert_allclose(logits(32), logits(read), rtol=0, atol=1e-4)

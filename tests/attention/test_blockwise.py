"""What blockwise attention promises beyond its values: cost, memory, and life under transforms."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.attention import mask as masks
from jaxlm.attention.attend import attend
from jaxlm.attention.blockwise import attend_blockwise
from jaxlm.attention.blockwise_tiles import Blocks, count_tiles
from jaxlm.attention.inputs import AttentionInputs, AttentionSpec
from tests.attention.cases import SCORES, Case, assert_close, build, value_and_gradients


def self_attention(length, *, heads=1, head_dim=4, document=None):
    """One row of documents of `document` tokens each (default: one document)."""
    rng = np.random.default_rng(0)
    shape, slots = (1, length, heads, head_dim), np.arange(length)
    document = document or length
    positions = jnp.asarray((slots % document)[None], jnp.int32)
    segments = jnp.asarray((1 + slots // document)[None], jnp.int32)
    q, k, v = (jnp.asarray(rng.normal(size=shape), jnp.float32) for _ in range(3))
    return AttentionInputs(q, k, v, positions, positions, segments, segments)


def spec(mask, **more):
    return AttentionSpec(mask, scale=0.5, aligned=True, **more)


BLOCKS = Blocks(queries=128, keys=128, rows=1024)


@functools.partial(jax.jit, static_argnums=0)
def tiles(spec, x):
    return count_tiles(spec, x, BLOCKS)


@functools.partial(jax.jit, static_argnums=0)
def blockwise(spec, x):
    return attend_blockwise(spec, x)


@pytest.mark.parametrize("document", [None, 700], ids=["one document", "packed"])
@pytest.mark.parametrize(
    "mask",
    [masks.sliding_window(256), masks.lambda_shaped(256, 4), masks.causal() & masks.chunked(256)],
    ids=["window", "lambda", "chunk"],
)
def test_tiles_grow_linearly_with_length(mask, document):
    """The counter is the loop's own trip count. Each block meets its window and a few starts."""
    counts = [
        int(tiles(spec(mask), self_attention(n * 700, document=document))) for n in (8, 16, 32)
    ]
    blocks = 32 * 700 // 128
    assert counts[2] <= 7 * blocks
    assert counts[2] - counts[1] <= 2.1 * (counts[1] - counts[0])


def test_causal_visits_half_the_tiles_and_packing_fewer():
    whole = int(tiles(spec(masks.full()), self_attention(2048)))
    half = int(tiles(spec(masks.causal()), self_attention(2048)))
    packed = int(tiles(spec(masks.causal()), self_attention(2048, document=256)))
    assert (whole, half, packed) == (16 * 16, 16 * 17 // 2, 8 * 3)


def test_far_tiles_are_met_once():
    """Only tiles on the ceiling's diagonal are met in both passes."""
    x = self_attention(2048)
    far = dataclasses.replace(x, q_far=x.q, k_far=x.k)
    counts = [int(tiles(spec(masks.causal(), ceiling=512), a)) for a in (x, far)]
    assert counts[1] - counts[0] == 16 - 4


def compiled_memory(length, implementation=attend_blockwise):
    x = self_attention(length, heads=4, head_dim=32)
    score = SCORES["alibi"][0]
    x = dataclasses.replace(x, head_parameters=jnp.ones((4, 1)))
    args = (implementation, spec(masks.causal(), score=score), x, x.q, x.q[..., 0])
    compiled = value_and_gradients.lower(*args).compile()
    return compiled.memory_analysis().temp_size_in_bytes, x.q.nbytes


def test_memory_is_linear_in_length():
    """Copies in tile order of q, k, v, out and gradients: some 16 arrays of q's size; scores at
    T = 8192 would be 256 such arrays. The tile itself does not grow.
    """
    (short, _), (long, array) = compiled_memory(4096), compiled_memory(8192)
    assert long < 24 * array
    assert long - short < 12 * array


def test_compiles_once_and_for_any_packing():
    run = jax.jit(attend_blockwise, static_argnums=0)
    for document in (None, 50, 90):
        run(spec(masks.causal()), self_attention(300, document=document))
    assert run._cache_size() == 1


def test_program_does_not_grow_with_length():
    def lines(length):
        x = jax.eval_shape(lambda: self_attention(length))
        args = (
            attend_blockwise,
            spec(masks.causal()),
            x,
            x.q,
            jax.ShapeDtypeStruct((1, length, 1), jnp.float32),
        )
        return value_and_gradients.lower(*args).as_text().count("\n")

    assert lines(32768) == lines(1024)


def test_a_document_alone_equals_the_same_document_packed():
    x = self_attention(600, heads=2, document=150)
    packed, _ = blockwise(spec(masks.causal()), x)
    alone = AttentionInputs(*(a[:, 150:300] for a in jax.tree.leaves(x)))
    out, _ = blockwise(spec(masks.causal()), alone)
    # Other blocks, so the sums come in another order: a few roundings of float32.
    np.testing.assert_allclose(packed[:, 150:300], out, atol=2e-6)


def test_vmap_over_models():
    """Many small models at once: arrays and head parameters differ, tokens are shared."""
    s, x, _ = build(Case(mask="lambda", score="alibi"))
    many = {
        n: np.stack([np.asarray(getattr(x, n)) * np.float32(f) for f in (1, 0.5, 2)])
        for n in ("q", "k", "v", "head_parameters")
    }

    def loss(arrays):
        out, lse = attend_blockwise(s, dataclasses.replace(x, **arrays))
        return jnp.square(out).sum() + jnp.where(lse > -1e30, lse, 0.0).sum()

    alone, together = jax.jit(jax.grad(loss)), jax.jit(jax.vmap(jax.grad(loss)))(many)
    for m in range(3):
        one = alone({n: a[m] for n, a in many.items()})
        for n, gradient in one.items():
            assert_close(together[n][m], np.asarray(gradient), n)


def test_vmap_over_everything():
    """Rows with tile lists of different lengths, each its own call."""
    s, x, _ = build(Case(mask="lambda", sizes=(3, 97, 97, 2, 1, 4)))
    rows = jax.tree.map(lambda a: np.asarray(a)[:, None], x)
    out, _ = jax.jit(jax.vmap(lambda x: attend_blockwise(s, x)))(rows)
    np.testing.assert_allclose(out[:, 0], blockwise(s, x)[0], atol=2e-6)


def test_layers_scanned_and_rematerialised():
    s, x, _ = build(Case(sizes=(1, 53, 53, 2, 2, 8)))

    def loss(q, implementation):
        @jax.checkpoint
        def layer(q, scale):
            y = dataclasses.replace(x, q=q, k=q * scale, v=q)
            return q + attend(s, y, implementation)[0], None

        return jnp.square(jax.lax.scan(layer, q, jnp.asarray([0.5, 0.7, 0.9]))[0]).sum()

    gradient = jax.jit(jax.grad(loss), static_argnums=1)
    assert_close(gradient(x.q, "blockwise"), np.asarray(gradient(x.q, "reference")))

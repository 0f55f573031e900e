"""The door to the decode kernel: what it does agrees with the form for every device."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.attention import decode
from jaxlm.attention import mask as masks
from jaxlm.attention.cached import SlotLayer
from jaxlm.attention.inputs import AttentionInputs, AttentionSpec, CachedLayer
from jaxlm.sharding.mesh import MeshConfig, make_mesh
from tests.kernels.interpret import random
from tests.marks import slow_but

SPEC = AttentionSpec(masks.causal(), scale=0.125)
# Rows begin with padding, and are not full: 100 and 128 of 150 slots.
FIRST, FILLED, SLOTS = np.array([[28], [0]]), 128, 150


def call(T=2, N=4, K=2, H=64, sinks=True):
    rng = np.random.default_rng(0)
    q, k, v = (random(rng, 2, T, heads, H) for heads in (N, K, K))
    slots = np.broadcast_to(np.arange(SLOTS), (2, SLOTS))
    seen = (slots >= FIRST) & (slots < FILLED)
    at = jnp.asarray(FILLED - FIRST + np.arange(T), jnp.int32)
    ids = jnp.ones((2, T), jnp.int32)
    sink_logits = random(rng, N) if sinks else None
    new = AttentionInputs(q, k, v, at, at, ids, ids, sink_logits=sink_logits)
    cached = CachedLayer(
        *(random(rng, 3, 2, K, SLOTS, H) for _ in "kv"),
        layer=jnp.asarray(1),
        positions=jnp.asarray(np.maximum(slots - FIRST, 0), jnp.int32),
        segment_ids=jnp.asarray(seen, jnp.int32),
    )
    return new, cached


@functools.partial(jax.jit, static_argnums=(1, 3, 4))
def attend(layer, spec, new, near_keys=None, far_keys=None):
    """In one program: most of the time of many small ones is their compiling."""
    return layer.attend(spec, new, near_keys, far_keys)


def as_they_are(k, _):
    """Keys that are met in some way are not the kernel's."""
    return k


def check(spec, new, cached, far_keys=None):
    assert decode.unsupported(spec, new, cached) is None
    found = attend(SlotLayer(cached), spec, new, None, far_keys)
    wanted = attend(SlotLayer(cached), spec, new, as_they_are, far_keys)
    assert found.dtype == wanted.dtype
    # float32 sums of 130 terms in another order.
    np.testing.assert_allclose(found, wanted, atol=2e-5, rtol=2e-5)


def test_it_is_chosen_on_a_tpu_and_agrees_with_the_form_for_every_device(on_tpu):
    new, cached = call()
    jaxpr = jax.make_jaxpr(lambda new, kept: SlotLayer(kept).attend(SPEC, new))(new, cached)
    assert "pallas_call" in str(jaxpr)
    check(dataclasses.replace(SPEC, softcap=3.0), new, cached)


def in_pages(cached, page=16):
    """The same in pages that lie in any order, of a pool that has some more."""
    L, B, K, S, H = cached.keys.shape
    n = -(-S // page)
    table = np.random.default_rng(0).permutation(B * n + 3)[: B * n].reshape(B, n)

    def pool(x):
        x = jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, n * page - S), (0, 0)))
        x = x.reshape(L, B, K, n, page, H).swapaxes(2, 3)
        return jnp.zeros((L, B * n + 3, K, page, H), x.dtype).at[:, table].set(x)

    def slots(x):
        return jnp.pad(x, ((0, 0), (0, n * page - S)))

    rest = slots(cached.positions), slots(cached.segment_ids), jnp.asarray(table, jnp.int32)
    return CachedLayer(pool(cached.keys), pool(cached.values), cached.layer, *rest)


@pytest.mark.parametrize(
    "mask", slow_but([masks.lambda_shaped(40, 3)], [masks.causal(), masks.lambda_shaped(40, 3)])
)
def test_pages_of_a_pool_are_read_as_slots_of_a_row(on_tpu, mask):
    new, cached = call(sinks=False)
    spec = dataclasses.replace(SPEC, mask=mask, ceiling=40)
    turned = dataclasses.replace(new, q_far=2 * new.q, k_far=new.k) if mask != SPEC.mask else new

    def far_keys(k, at):
        return k + jnp.cos(at)[..., None, None]

    far = None if turned is new else far_keys
    check(spec, turned, in_pages(cached), far)
    met = (as_they_are, far)
    found, wanted = (attend(SlotLayer(c), spec, turned, *met) for c in (in_pages(cached), cached))
    # The same terms and some more zeros, in another order.
    np.testing.assert_allclose(found, wanted, atol=2e-6, rtol=2e-6)


def test_window_and_kept_sinks(on_tpu):
    check(dataclasses.replace(SPEC, mask=masks.lambda_shaped(40, 3)), *call(sinks=False))


def test_on_a_mesh_each_device_has_its_rows_and_heads(on_tpu):
    """One device here; tests/attention/test_decode_aot.py compiles for four."""
    with jax.set_mesh(make_mesh(MeshConfig())):
        check(dataclasses.replace(SPEC, mask=masks.sliding_window(40)), *call())


@pytest.mark.parametrize(
    ("mask", "answer"),
    [
        (masks.causal(), (None, 0)),
        (masks.sliding_window(7), (7, 0)),
        (masks.lambda_shaped(7, 2), (7, 2)),
        (masks.sliding_window(5) & masks.lambda_shaped(7, 2), (5, 0)),
        (masks.sliding_window(9) & masks.lambda_shaped(7, 2), None),
        (masks.kept_sinks(2), None),
        (masks.prefix(3), None),
        (masks.chunked(3), None),
        (masks.full(), None),
        (masks.sliding_window(7) | masks.sliding_window(9), None),
        (masks.lambda_shaped(7, 2) | masks.chunked(4), None),
    ],
    ids=str,
)
def test_which_masks_the_kernel_knows(mask, answer):
    assert decode.window_and_sinks(mask) == answer


REASONS = {
    "129 tokens": {"T": 129},
    "head_dim=12": {"H": 12},
}


@pytest.mark.parametrize("reason", REASONS)
def test_shapes_for_the_other_form(on_tpu, reason):
    new, cached = call(**REASONS[reason])
    assert decode.unsupported(SPEC, new, cached).startswith(reason)
    assert "pallas_call" not in str(
        jax.make_jaxpr(lambda new, kept: SlotLayer(kept).attend(SPEC, new))(new, cached)
    )


def test_what_else_is_for_the_other_form(on_tpu):
    new, cached = call()

    def reason(spec=SPEC, new=new):
        return decode.unsupported(spec, new, cached)

    scored = dataclasses.replace(SPEC, score=lambda head, s, distance, i: 2 * s)
    assert "no bias" in reason(scored)
    biased = dataclasses.replace(scored, score_form="bias")
    assert reason(biased) is None
    assert "larger than the cache" in reason(biased, call(T=65)[0])
    turned = dataclasses.replace(new, q_far=new.q)
    assert reason(new=turned) == "ceiling=None with window=None"
    near = dataclasses.replace(SPEC, mask=masks.lambda_shaped(40, 3), ceiling=40)
    assert reason(near, turned) is None
    assert "ceiling=39" in reason(dataclasses.replace(near, ceiling=39), turned)
    many = dataclasses.replace(near, mask=masks.lambda_shaped(40, 76))
    assert reason(many, turned) == "76 sinks of 2 tokens, which are more than the cache"
    half = dataclasses.replace(new, q=new.q.astype(jnp.float16))
    assert reason(new=half) == "dtype=float16"
    paged = dataclasses.replace(call()[1], pages=jnp.zeros((2, 129000), jnp.int32))
    assert decode.unsupported(SPEC, new, paged) == (
        "a table of (2, 129000) pages, which is larger than scalar memory"
    )
    prefix = dataclasses.replace(SPEC, mask=masks.prefix(3))
    assert reason(prefix).startswith("mask=AttentionMask")


def test_far_sinks_of_several_documents_in_a_row(on_tpu):
    """Each query meets the sinks of its own, from the ceiling on in another rotation."""
    new, cached = call(sinks=False)
    slots = np.arange(SLOTS)
    # Two documents in the cache, of 70 and 58 tokens; the slots of the first are turned around.
    order = np.roll(np.where(slots < 70, 69 - slots, slots - 70), 9)
    ids = np.roll(np.where(slots < FILLED, 1 + (slots >= 70), 0), 9)
    cached = dataclasses.replace(
        cached,
        positions=jnp.broadcast_to(jnp.asarray(order, jnp.int32), (2, SLOTS)),
        segment_ids=jnp.broadcast_to(jnp.asarray(ids, jnp.int32), (2, SLOTS)),
    )
    new = dataclasses.replace(
        new,
        q_positions=jnp.array([[70, 58], [58, 70]]),
        q_segment_ids=jnp.array([[1, 2], [2, 0]]),
        q_far=new.q[..., ::-1],
        k_far=-new.k,
    )
    spec = dataclasses.replace(SPEC, mask=masks.lambda_shaped(40, 3), ceiling=57)
    check(spec, new, cached, far_keys=lambda k, at: k + jnp.cos(at)[..., None, None])


def test_without_a_tpu():
    assert decode.unsupported(SPEC, *call()) == "a device that is no TPU"

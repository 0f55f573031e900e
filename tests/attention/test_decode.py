"""The door to the decode kernel: what it does agrees with the form for every device."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from jaxlm.attention import decode
from jaxlm.attention import mask as masks
from jaxlm.attention.cached import attend_cached
from jaxlm.attention.inputs import AttentionInputs, AttentionSpec, CachedLayer
from jaxlm.sharding.mesh import MeshConfig, make_mesh

SPEC = AttentionSpec(masks.causal(), scale=0.125)
# Rows begin with padding, and are not full: 100 and 128 of 150 slots.
FIRST, FILLED, SLOTS = np.array([[28], [0]]), 128, 150


def call(T=2, N=4, K=2, H=64, sinks=True):
    keys = jax.random.split(jax.random.key(0), 6)
    q, k, v = (
        jax.random.normal(key, (2, T, heads, H))
        for key, heads in zip(keys[:3], (N, K, K), strict=True)
    )
    slots = np.broadcast_to(np.arange(SLOTS), (2, SLOTS))
    seen = (slots >= FIRST) & (slots < FILLED)
    at = jnp.asarray(FILLED - FIRST + np.arange(T), jnp.int32)
    ids = jnp.ones((2, T), jnp.int32)
    sink_logits = jax.random.normal(keys[3], (N,)) if sinks else None
    new = AttentionInputs(q, k, v, at, at, ids, ids, sink_logits=sink_logits)
    cached = CachedLayer(
        *(jax.random.normal(key, (3, 2, K, SLOTS, H)) for key in keys[4:]),
        layer=jnp.asarray(1),
        positions=jnp.asarray(np.maximum(slots - FIRST, 0), jnp.int32),
        segment_ids=jnp.asarray(seen, jnp.int32),
    )
    return new, cached


@pytest.fixture
def on_tpu(monkeypatch):
    """As traced for a TPU, and run by its interpreter."""
    monkeypatch.setattr(decode, "target_chip", lambda: "v5e")
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(uninitialized_memory="nan")):
        yield


def check(spec, new, cached):
    assert decode.unsupported(spec, new) is None
    found = attend_cached(spec, new, cached)
    # Keys that are met in some way are not the kernel's.
    wanted = attend_cached(spec, new, cached, lambda k: (k, None))
    assert found.dtype == wanted.dtype
    # float32 sums of 130 terms in another order.
    np.testing.assert_allclose(found, wanted, atol=2e-5, rtol=2e-5)


def test_it_is_chosen_on_a_tpu_and_agrees_with_the_form_for_every_device(on_tpu):
    new, cached = call()
    jaxpr = jax.make_jaxpr(lambda *x: attend_cached(SPEC, *x))(new, cached)
    assert "pallas_call" in str(jaxpr)
    check(dataclasses.replace(SPEC, softcap=3.0), new, cached)


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
    assert decode.unsupported(SPEC, new).startswith(reason)
    assert "pallas_call" not in str(jax.make_jaxpr(lambda *x: attend_cached(SPEC, *x))(new, cached))


def test_what_else_is_for_the_other_form(on_tpu):
    new, _ = call()
    scored = dataclasses.replace(SPEC, score=lambda head, s, distance, i: s)
    assert "changes scores" in decode.unsupported(scored, new)
    assert "ceiling" in decode.unsupported(SPEC, dataclasses.replace(new, q_far=new.q))
    half = dataclasses.replace(new, q=new.q.astype(jnp.float16))
    assert decode.unsupported(SPEC, half) == "dtype=float16"
    prefix = dataclasses.replace(SPEC, mask=masks.prefix(3))
    assert decode.unsupported(prefix, new).startswith("mask=AttentionMask")


def test_without_a_tpu():
    assert decode.unsupported(SPEC, call()[0]) == "a device that is no TPU"

"""The door to the TPU kernels: what they do agrees with the reference, what they do not is said."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from jaxlm.attention import flash
from jaxlm.attention import mask as masks
from jaxlm.attention.attend import attend
from jaxlm.attention.inputs import AttentionInputs, AttentionSpec
from jaxlm.attention.reference import attend_reference
from jaxlm.sharding.mesh import MeshConfig, make_mesh

SPEC = AttentionSpec(masks.causal(), scale=0.125, aligned=True)


def inputs(T=130, N=4, K=2, H=64, sinks=True):
    keys = jax.random.split(jax.random.key(0), 4)
    q, k, v = (
        jax.random.normal(key, (2, T, heads, H))
        for key, heads in zip(keys[:3], (N, K, K), strict=True)
    )
    ids = np.ones((2, T), np.int32)
    ids[0, 50:], ids[1, 120:] = 2, 0
    at = np.tile(np.arange(T, dtype=np.int32), (2, 1))
    at[0, 50:] -= 50
    at, ids = jnp.asarray(at), jnp.asarray(ids)
    sink_logits = jax.random.normal(keys[3], (N,)) if sinks else None
    return AttentionInputs(q, k, v, at, at, ids, ids, sink_logits=sink_logits)


@pytest.fixture
def on_tpu(monkeypatch):
    """As traced for a TPU, and run by its interpreter."""
    monkeypatch.setattr(flash, "target_chip", lambda: "v5e")
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(uninitialized_memory="nan")):
        yield


def check(spec, x):
    """Values and gradients, the sink logits' too."""

    def loss(attend, q, k, v, sink_logits):
        given = dataclasses.replace(x, q=q, k=k, v=v, sink_logits=sink_logits)
        out, lse = attend(spec, given)
        seen = (x.q_segment_ids != 0)[..., None]
        return (out * jnp.cos(out)).sum() + jnp.where(seen, lse, 0.0).sum(), out

    def both(attend):
        grad = jax.value_and_grad(loss, (1, 2, 3, 4), has_aux=True)
        return grad(attend, x.q, x.k, x.v, x.sink_logits)

    # float32 sums of 130 terms in another order.
    for a, b in zip(*(jax.tree.leaves(both(f)) for f in (attend, attend_reference)), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5, rtol=2e-5)


def test_it_is_chosen_on_a_tpu_and_agrees_with_the_reference(on_tpu):
    x = inputs()
    assert flash.unsupported(SPEC, x) is None
    jaxpr = jax.make_jaxpr(lambda x: attend(SPEC, x))(x)
    assert "pallas_call" in str(jaxpr)
    check(dataclasses.replace(SPEC, softcap=3.0), x)


def test_on_a_mesh_each_device_has_its_rows_and_heads(on_tpu):
    """One device here; tests/attention/test_flash_aot.py compiles for four."""
    mesh = make_mesh(MeshConfig())
    with jax.set_mesh(mesh):
        check(dataclasses.replace(SPEC, mask=masks.sliding_window(40)), inputs())


REASONS = {
    "mask=AttentionMask": {"mask": masks.lambda_shaped(8, 2)},
    "not the same tokens": {"aligned": False},
    "changes scores or has a ceiling": {"ceiling": 8},
}


@pytest.mark.parametrize("reason", REASONS)
def test_what_the_kernels_do_not_do(on_tpu, reason):
    spec, x = dataclasses.replace(SPEC, **REASONS[reason]), inputs(T=8, sinks=False)
    with pytest.raises(ValueError, match=f"implementation='flash' for .*{reason}.*; allowed: "):
        attend(spec, x, "flash")
    out, _ = attend(spec, x)  # auto: another implementation
    np.testing.assert_allclose(out, attend_reference(spec, x)[0], atol=1e-5)


def test_a_head_dim_that_the_kernels_do_not_take(on_tpu):
    with pytest.raises(ValueError, match="implementation='flash' for head_dim=24; allowed: "):
        attend(SPEC, inputs(T=8, H=24), "flash")


def test_a_dtype_that_the_kernels_do_not_take(on_tpu):
    x = jax.tree.map(lambda a: a.astype(jnp.float16) if a.ndim == 4 else a, inputs(T=8))
    assert flash.unsupported(SPEC, x) == "dtype=float16"


def test_without_a_tpu():
    with pytest.raises(ValueError, match="implementation='flash' for a device that is no TPU"):
        attend(SPEC, inputs(T=8), "flash")

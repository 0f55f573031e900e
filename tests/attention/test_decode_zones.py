"""The door to the kernel of several precisions: it agrees with the form for every device."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import positions
from jaxlm.attention import decode_zones
from jaxlm.attention import mask as masks
from jaxlm.attention.averaged import AveragedLayer
from jaxlm.attention.quantized_layer import QuantizedLayer
from jaxlm.attention.zoned import ZonedLayer
from jaxlm.positions.encoding import Dimensions
from jaxlm.sharding.mesh import MeshConfig, make_mesh
from kernels.kv_quantize.reference import quantize_keys, quantize_values
from tests.attention.test_decode import SPEC, call
from tests.marks import slow_but

OLD = 128  # slots of the zone, whose tokens come before those of the full one


def zoned(bits=8, window=None):
    """New tokens, and a cache of two rows whose second has an empty zone."""
    new, full = call()
    keys = jax.random.split(jax.random.key(7), 2)
    k, v = (jax.random.normal(key, (3, 2, 2, OLD, 64)) for key in keys)
    at = jnp.broadcast_to(jnp.arange(OLD)[None], (2, OLD))
    there = jnp.where(jnp.arange(2)[:, None] == 0, 1, 0) * jnp.ones_like(at)
    zone = QuantizedLayer(
        quantize_keys(k, bits, 32), quantize_values(v, bits, 32), full.layer, at, there
    )
    later = {"q_positions": new.q_positions + OLD, "k_positions": new.k_positions + OLD}
    new = dataclasses.replace(new, **later)
    full = dataclasses.replace(
        full,
        keys=full.keys[:, :, :, :128],
        values=full.values[:, :, :, :128],
        positions=full.positions[:, :128] + OLD,
        segment_ids=full.segment_ids[:, :128],
    )
    return new, ZonedLayer(full, (zone,), window)


def check(spec, new, layer):
    quantized = tuple(zone for zone in layer.zones if isinstance(zone, QuantizedLayer))
    assert decode_zones.unsupported(spec, new, layer.full, quantized) is None
    found = layer.attend(spec, new)
    # Keys that are met in some way are not the kernel's.
    wanted = layer.attend(spec, new, lambda k, _: k)
    assert found.dtype == wanted.dtype
    # float32 sums of 258 terms in another order.
    np.testing.assert_allclose(found, wanted, atol=3e-5, rtol=3e-5)


def test_it_is_chosen_on_a_tpu(on_tpu):
    new, layer = zoned()
    jaxpr = jax.make_jaxpr(lambda new, layer: layer.attend(SPEC, new))(new, layer)
    assert "quantized_decode_attention" in str(jaxpr)


def test_it_agrees_with_the_form_for_every_device(on_tpu):
    """On a mesh, of one device here, and with a window and sinks."""
    with jax.set_mesh(make_mesh(MeshConfig())):
        check(SPEC, *zoned(4, masks.lambda_shaped(160, 3)))


@pytest.mark.parametrize(
    "name",
    slow_but(["alibi", "fire", "rope_alibi"], ["alibi", "t5", "kerple", "fire", "rope_alibi"]),
)
def test_what_an_encoding_adds_is_read_beside_the_codes(on_tpu, name):
    """A bias of every zone; one that is larger than the codes is for the other form."""
    at = Dimensions(4, 64, 512, 512)
    encoding = positions.parse(name).bind(at)
    params = {
        name: 0.3 + jax.random.normal(jax.random.key(n), p.shape)
        for n, (name, p) in enumerate(encoding.parameters(at).items())
    }
    spec = dataclasses.replace(SPEC, score=encoding.score, score_form=encoding.score_form)
    new, layer = zoned(4)
    new = dataclasses.replace(new, head_parameters=encoding.head_parameters(params, 4))
    check(spec, new, layer)
    plain = layer.attend(SPEC, new)
    assert np.abs(layer.attend(spec, new) - plain).max() > 0.01
    many = dataclasses.replace(call(T=20)[0], head_parameters=new.head_parameters)
    told = decode_zones.unsupported(spec, many, layer.full, layer.zones)
    assert told == "a bias of 20 tokens of 4 heads, which is larger than the cache"


def test_a_mean_is_merged_with_what_the_kernel_has_read(on_tpu):
    """Beside a zone of few bits, and as the only one; the second row has none."""
    new, layer = zoned()
    k, v = jax.random.normal(jax.random.key(9), (2, 2, 1, 2, 64))
    count = jnp.array([50, 0])
    there = (count[:, None] > 0).astype(jnp.int32)
    mean = AveragedLayer(k, v, count, jnp.zeros_like(there), there)
    for zones in ((*layer.zones, mean), (mean,)):
        check(SPEC, new, dataclasses.replace(layer, zones=zones))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"H": 32}, "head_dim=32"),
        ({"far": True}, "another rotation"),
        ({"mask": masks.chunked(8)}, "mask="),
    ],
)
def test_what_it_does_not_do_is_told(on_tpu, change, told):
    new, layer = zoned()
    spec = SPEC
    if "H" in change:
        new = dataclasses.replace(new, q=new.q[..., :32])
    if "far" in change:
        new = dataclasses.replace(new, q_far=new.q)
        spec = dataclasses.replace(SPEC, mask=masks.sliding_window(9), ceiling=9)
    if "mask" in change:
        spec = dataclasses.replace(SPEC, mask=change["mask"])
    assert told in decode_zones.unsupported(spec, new, layer.full, layer.zones)

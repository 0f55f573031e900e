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
from tests.attention.test_decode import SPEC, as_they_are, attend, call
from tests.kernels.interpret import random
from tests.kernels.test_quantized_decode_attention import to_keys, to_values
from tests.marks import slow_but

OLD = 128  # slots of the zone, whose tokens come before those of the full one


def zoned(bits=8, window=None):
    """New tokens, and a cache of two rows whose second has an empty zone."""
    new, full = call()
    rng = np.random.default_rng(7)
    k, v = (random(rng, 3, 2, 2, OLD, 64) for _ in "kv")
    at = jnp.asarray(np.tile(np.arange(OLD, dtype=np.int32), (2, 1)))
    there = jnp.asarray(np.repeat(np.array([[1], [0]], np.int32), OLD, 1))
    zone = QuantizedLayer(to_keys(k, bits, 32), to_values(v, bits, 32), full.layer, at, there)
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
    found = attend(layer, spec, new)
    wanted = attend(layer, spec, new, as_they_are)
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
    slow_but(["alibi", "fire"], ["alibi", "t5", "kerple", "fire", "rope_alibi"]),
)
def test_what_an_encoding_adds_is_read_beside_the_codes(on_tpu, name):
    """A bias of every zone; one that is larger than the codes is for the other form."""
    at, rng = Dimensions(4, 64, 512, 512), np.random.default_rng(0)
    encoding = positions.parse(name).bind(at)
    params = {name: 0.3 + random(rng, *p.shape) for name, p in encoding.parameters(at).items()}
    spec = dataclasses.replace(SPEC, score=encoding.score, score_form=encoding.score_form)
    new, layer = zoned(4)
    new = dataclasses.replace(new, head_parameters=encoding.head_parameters(params, 4))
    check(spec, new, layer)
    plain = attend(layer, SPEC, new)
    assert np.abs(attend(layer, spec, new) - plain).max() > 0.01
    many = dataclasses.replace(call(T=20)[0], head_parameters=new.head_parameters)
    told = decode_zones.unsupported(spec, many, layer.full, layer.zones)
    assert told == "a bias of 20 tokens of 4 heads, which is larger than the cache"


@pytest.mark.parametrize("alone", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_mean_is_merged_with_what_the_kernel_has_read(on_tpu, alone):
    """Beside a zone of few bits, and as the only one; the second row has none."""
    new, layer = zoned()
    rng = np.random.default_rng(9)
    k, v = (random(rng, 2, 1, 2, 64) for _ in "kv")
    count, at, there = (jnp.asarray(x, jnp.int32) for x in ([50, 0], [[0], [0]], [[1], [0]]))
    mean = AveragedLayer(k, v, count, at, there)
    zones = (mean,) if alone else (*layer.zones, mean)
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

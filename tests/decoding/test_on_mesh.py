"""Decoding on eight simulated devices, whose caches are cut as the model is."""

import json

import pytest

from tests.decoding import tiny
from tests.decoding.test_caches import SETTINGS
from tests.devices import on_devices

# Of a cache's largest arrays, on a mesh of data, fsdp and tensor, two devices each. A page may be
# any row's, and a layer's retrieval heads any.
PARTS = {"paged": 2, "razor": 4}


IN_EVERY_RUN = ("dense",)
OTHERS = tuple(sorted(set(SETTINGS) - set(IN_EVERY_RUN)))


@pytest.fixture(scope="module", params=[IN_EVERY_RUN, pytest.param(OTHERS, marks=pytest.mark.slow)])
def found(request):
    """By cache. The process holds what is drawn to what one device draws."""
    return json.loads(on_devices(8, "tests.decoding.mesh_process", *request.param))


def test_each_device_keeps_its_part_where_it_lies(found):
    for cache, of_loop in found.items():
        assert of_loop["parts"] == PARTS.get(cache, 8)
        assert of_loop["aliased"] >= of_loop["bytes"]


def test_no_cache_is_moved(found):
    """Parameters are gathered, and what is moved of tokens is less."""
    matrix = tiny.params()["embedding"].size
    assert all(of_loop["moved"] <= matrix for of_loop in found.values())
    assert matrix < min(found[name]["largest"] for name in found if name != "ring")

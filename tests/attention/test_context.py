"""Rows cut over devices: each form is exact, and exchanges and holds no more than it says."""

import json

import pytest

from jaxlm.attention import mask as masks
from jaxlm.attention.context import FORMS
from jaxlm.attention.halo import Reach, parts_before, reach_of
from jaxlm.training.run import RunConfig
from tests.devices import on_devices
from tests.marks import slow_but
from tests.positions.test_shared import CASES

KEPT = (("ring", "rope"),)


@pytest.fixture(scope="module", params=FORMS)
def found(request):
    return request.param, json.loads(on_devices(8, "tests.attention.ring_process", request.param))


def test_what_is_exchanged(found):
    """The process holds values and gradients to the reference's."""
    form, exchanges = found
    if form == "all_to_all":
        for of_mask in exchanges.values():
            # q, k, v and back, in both directions; gathered are positions and segment ids alone.
            assert of_mask["all-to-all"] >= 6 and of_mask["all-gather"] <= 4
        return
    whole = exchanges.pop("bytes")
    # Of 8 parts of keys, values and their gradients a device holds two, and its own dealt out.
    assert whole["ring"] < 0.6 * whole["gathered"]
    sinks = {name for name in exchanges if name in ("lambda", "lambda, two parts back")}
    assert {name for name, kinds in exchanges.items() if "all-gather" in kinds} == sinks
    near, far = (exchanges[name]["collective-permute"] for name in ("sliding", "causal"))
    assert near <= 6 < far  # of k, v and the two of the tokens, and back


@pytest.mark.parametrize(
    ("form", "case"),
    slow_but(KEPT, [(form, case) for form in FORMS for case in CASES]),
)
def test_every_position_encoding(form, case):
    on_devices(8, "tests.positions.context_process", form, case)


def test_how_far_masks_reach():
    assert reach_of(masks.lambda_shaped(256, 4)) == Reach(256, 4)
    assert reach_of(masks.sliding_window(9) & masks.chunked(4)) == Reach(4, 0)
    for mask in (masks.causal(), masks.full(), masks.prefix(3)):
        assert reach_of(mask) is None
    assert [parts_before(Reach(window, 0), 8) for window in (1, 2, 9, 10, 17, 18)] == [
        *(0, 1, 1, 2, 2, 3)
    ]


@pytest.mark.parametrize(
    ("form", "mesh", "message"),
    [
        ("ring", {"context": 3}, "sequence_length=32; allowed: a multiple of 2 × mesh.context = 6"),
        (
            "all_to_all",
            {"context": 8, "tensor": 2},
            r"mesh.context=8 and 4 query and 1 key/value heads a device of mesh.tensor; "
            r"allowed: context = 1, 2, 4$",
        ),
    ],
)
def test_rows_and_heads_that_can_not_be_shared_out(form, mesh, message):
    attention = {"num_heads": 8, "num_kv_heads": 2, "implementation": form}
    run = RunConfig.from_dict(
        {"model": {"attention": attention}, "data": {"sequence_length": 32}, "mesh": mesh}
    )
    with pytest.raises(ValueError, match=message):
        run.check_model()

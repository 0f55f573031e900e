"""Attention's loops on a mesh: each device does its part, and asks the others for little."""

import json

from tests.devices import on_devices


def test_blockwise_is_cut_along_rows_heads_and_queries():
    found = json.loads(on_devices(8, "tests.attention.mesh_process"))
    for kind in ("lambda", "causal"):
        # Sums over rows: of the loss, and of gradients of what all rows share. A gather of rows or
        # heads would be all devices' work on each.
        assert found[f"data {kind}"] == ["all-reduce"]
        assert found[f"tensor {kind}"] == ["all-reduce"]
        assert set(found[f"context {kind}"]) <= {"all-gather", "all-reduce"}

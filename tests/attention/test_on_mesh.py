"""Attention's loops on a mesh: each device does its part, and asks the others for little."""

import json
import os
import subprocess
import sys


def test_blockwise_is_cut_along_rows_heads_and_queries():
    command = [sys.executable, "-W", "error", "-m", "tests.attention.mesh_process"]
    flags = os.environ["XLA_FLAGS"] + " --xla_force_host_platform_device_count=8"
    env = {**os.environ, "XLA_FLAGS": flags}
    run = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    found = json.loads(run.stdout)
    for kind in ("lambda", "causal"):
        # Sums over rows: of the loss, and of gradients of what all rows share. A gather of rows or
        # heads would be all devices' work on each.
        assert found[f"data {kind}"] == ["all-reduce"]
        assert found[f"tensor {kind}"] == ["all-reduce"]
        assert set(found[f"context {kind}"]) <= {"all-gather", "all-reduce"}

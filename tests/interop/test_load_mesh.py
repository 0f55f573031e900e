"""A checkpoint loaded over a mesh is cut as in training, and holds the same numbers."""

import json
import os
import subprocess
import sys

from tests.interop.folders import read_golden
from tests.interop.gguf_files import write_gguf

# Prints into how many different parts each parameter is cut.
PROGRAM = """
import json, sys
import jax, numpy as np
import jaxlm
from jaxlm.model.parameters import parameter_shardings
from jaxlm.sharding.mesh import MeshConfig, make_mesh

assert jax.device_count() == 4
mesh = make_mesh(MeshConfig(data=1, fsdp=2, tensor=2))
model, params, _ = jaxlm.load(sys.argv[1], mesh=mesh)
_, whole, _ = jaxlm.load(sys.argv[1])
shardings, parts = parameter_shardings(model, mesh), {}

def check(path, x, sharding, want):
    assert x.sharding.is_equivalent_to(sharding, x.ndim), path
    np.testing.assert_array_equal(x, want)
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    parts[name] = len({str(shard.index) for shard in x.addressable_shards})

jax.tree_util.tree_map_with_path(check, params, shardings, whole)
print(json.dumps(parts))
"""
# By fsdp 2 × tensor 2; norms are everywhere whole.
CUTS = {
    "embedding": 4,
    "head": 4,
    "final_norm/scale": 1,
    "layers/block_0/attention/k/kernel": 4,
    "layers/block_0/feed_forward/down/kernel": 4,
    "layers/block_0/attention_norm/scale": 1,
}


def test_load_on_a_mesh(tmp_path):
    _, config, shapes = read_golden("llama")
    config |= {"vocab_size": 98}
    shapes = {name: [98 if s == 97 else s for s in shape] for name, shape in shapes.items()}
    path = write_gguf(tmp_path / "m.gguf", config, shapes)
    flags = os.environ["XLA_FLAGS"] + " --xla_force_host_platform_device_count=4"
    command = [sys.executable, "-W", "error", "-c", PROGRAM, str(path)]
    env = {**os.environ, "XLA_FLAGS": flags}
    run = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    parts = json.loads(run.stdout)
    assert {name: parts[name] for name in CUTS} == CUTS

"""A decode loop for absent TPUs holds the decode kernel, one for each device's rows and heads."""

import json
import os
import subprocess
import sys

import pytest

from launch.aot.topology import environment
from tests.kernels.aot import needs_libtpu

LOOP = """
import functools
import re
import jax
import jax.numpy as jnp
import jaxlm
from jax.sharding import NamedSharding, PartitionSpec
from launch.aot.topology import pod_mesh
from jaxlm.model.parameters import placed_params
from jaxlm import caches
from jaxlm.decoding.engine import decode
from jaxlm.decoding.history import History
from jaxlm.decoding.sampling import Sampling
from jaxlm.decoding.state import DecodeState

mesh = pod_mesh("TOPOLOGY", {"data": 2, "fsdp": 1, "tensor": 2})
config = jaxlm.ModelConfig(
    vocab_size=512, num_layers=2, d_model=256, context_length=4096, position_encoding="ENCODING",
    attention=jaxlm.AttentionConfig(num_heads=8, num_kv_heads=4, head_dim=128),
    numerics=jaxlm.NumericsConfig(dtype="bfloat16"),
)
model = jaxlm.Transformer(config)
params = placed_params(model, mesh)
B, S, M = 4, 4096, 64


def placed(shape, dtype):
    axes = {2: ("data",), 5: (None, ROWS, "tensor")}.get(len(shape), ())
    place = NamedSharding(mesh, PartitionSpec(*axes))
    return jax.ShapeDtypeStruct(shape, dtype, sharding=place)


state = DecodeState(
    tokens=jnp.zeros((B, M), jnp.int32),
    drawn=jnp.ones(B, jnp.int32),
    lengths=jnp.ones(B, jnp.int32),
    done=jnp.zeros(B, bool),
    cache=caches.parse("CACHE").init(config, B, S),
    steps=jnp.zeros((), jnp.int32),
    history=History(None, None, None),
    logprobs=None,
    limit=M - 1,
)
sampling = Sampling.make(B)
state, sampling = jax.tree.map(lambda a: placed(a.shape, a.dtype), (state, sampling))
until, stops = placed((), jnp.int32), placed((1,), jnp.int32)
with jax.set_mesh(mesh):  # nothing may run: there are no such devices
    text = decode.lower(model, params, state, until, sampling, stops).compile().as_text()
layer = r"= bf16\\[(1,)?(1,)?LAYER,128\\]"
print("layers cut out", sum(bool(re.search(layer, line)) for line in text.splitlines()))
copy = r"= bf16\\[2,LAYER,128\\]\\S* copy\\("
print("caches copied", sum(bool(re.search(copy, line)) for line in text.splitlines()))
for line in text.splitlines():
    if "tpu_custom_call" in line and "decode_attention" in line:
        print("out", re.search(r"bf16\\[([\\d,]+)\\]", line)[1])
        cache = r"bf16\\[([\\d,]*SLOTS,128)\\]"
        print("cache", *re.findall(cache, line))
"""


@pytest.mark.tpu_aot
@needs_libtpu
@pytest.mark.parametrize(
    ("topology", "encoding"),
    [
        ("v5e:2x2", "rope"),
        ("v6e:2x2", "rope"),
        ("v5e:2x2", "alibi"),
        ("v5e:2x2", "lm_infinite(rope, window=1024)"),
    ],
)
def test_a_decode_loop_holds_the_kernel(topology, encoding):
    # A device has two rows of the four and two kv heads of the four, each with two query heads in
    # one sublane tile; it reads layers × rows where they lie.
    cache = "cache" + 2 * " 4,2,4096,128"
    nothing = ["layers cut out 0", "caches copied 0"]
    out = "out 1,2,2,8,128"
    assert decode_loop(topology, encoding, "dense", "2,2,4096") == [*nothing, out, cache]


@pytest.mark.tpu_aot
@needs_libtpu
@pytest.mark.parametrize("encoding", ["rope", "lm_infinite(rope, window=1024)"])
def test_a_decode_loop_with_pages_holds_the_kernel(encoding):
    """A device has its heads of all pages, 257 of each layer, and reads those of its rows."""
    found = decode_loop("v5e:2x2", encoding, "paged(page=64)", "257,2,64")
    pages = "cache" + 2 * 8 * " 514,2,64,128"
    assert found == ["layers cut out 0", "caches copied 0", "out 1,2,2,8,128", pages]


def decode_loop(topology, encoding, cache, layer):
    """What a loop says of itself; `layer` is the shape of one in the cache but for head_dim."""
    rows = "None" if cache.startswith("paged") else '"data"'
    given = {"TOPOLOGY": topology, "ENCODING": encoding, "CACHE": cache, "LAYER": layer}
    loop = LOOP
    for name, value in (given | {"ROWS": rows, "SLOTS": layer.split(",")[-1]}).items():
        loop = loop.replace(name, value)
    command = [sys.executable, "-c", loop]
    run = subprocess.run(
        command, env=environment(os.environ), capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return run.stdout.splitlines()


@pytest.mark.tpu_aot
@needs_libtpu
@pytest.mark.parametrize("topology", ["v5e:2x2", "v6e:2x2"])
def test_a_step_moves_as_many_bytes_as_its_cache_has(topology):
    """And what little there is beside it: no layer is cut out, no cache is copied."""
    kinds = ["dense", "ring(window=4096)", *(f"quantized(bits={bits})" for bits in (8, 4, 2))]
    kinds.append("razor(heads=((0, 1), (2, 3)), window=4096)")
    command = [sys.executable, "-m", "tests.decoding.step_bytes", topology, *kinds]
    run = subprocess.run(
        command, env=environment(os.environ), capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr[-3000:]
    found = json.loads(run.stdout.splitlines()[-1])
    for nbytes, moved in found.values():
        assert nbytes <= moved < 1.1 * nbytes, found

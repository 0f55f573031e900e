"""Programs for absent TPUs hold the attention kernels, for each device's heads or queries."""

import importlib.util
import os
import subprocess
import sys

import pytest

from launch.aot.topology import environment

SETUP = """
import re
import jax
import jax.numpy as jnp
import jaxlm
from launch.aot.topology import pod_mesh
from jaxlm.model.parameters import placed_params
from jaxlm.sharding.mesh import batch_sharding
from jaxlm.training.config import TrainConfig
from jaxlm.training.loop import compile_step
from jaxlm.training.optimizers import make_optimizer
from jaxlm.training.state import abstract_state
from jaxlm.training.step import make_train_step

mesh = pod_mesh("TOPOLOGY", MESH)
config = jaxlm.ModelConfig(
    vocab_size=512, num_layers=2, d_model=256, context_length=1024, position_encoding="ENCODING",
    attention=jaxlm.AttentionConfig(
        num_heads=4, num_kv_heads=2, head_dim=128, implementation="IMPLEMENTATION"
    ),
    numerics=jaxlm.NumericsConfig(dtype="bfloat16"),
)
model, train = jaxlm.Transformer(config), TrainConfig(steps=2)
optimizer = make_optimizer(train.optimizer, 2)
shapes = abstract_state(placed_params(model, mesh), optimizer, train, mesh)
rows = batch_sharding(mesh, 4, 1024)
names = ("tokens", "targets", "positions", "segment_ids")
batch = {n: jax.ShapeDtypeStruct((4, 1024), jnp.int32, sharding=rows) for n in names}
"""

STEP = """
batch["loss_weights"] = jax.ShapeDtypeStruct((4, 1024), jnp.float32, sharding=rows)
step = compile_step(make_train_step(model, optimizer, train), shapes)
with jax.set_mesh(mesh):  # nothing may run: there are no such devices
    text = step.lower(shapes, batch).compile().as_text()
"""

# Positions in no order: of a loss' gradient.
GRADIENT = """
def loss(params, batch):
    given = batch["tokens"], batch["positions"], batch["segment_ids"], None, False
    return model.apply({"params": params}, *given)[0].mean()


with jax.set_mesh(mesh):
    text = jax.jit(jax.grad(loss)).lower(shapes.params, batch).compile().as_text()
"""

PRINT = """
for name in ("forward", "backward"):
    for line in text.splitlines():
        if "tpu_custom_call" in line and f"flash_attention_{name}" in line:
            print(name, re.search(r"bf16\\[([\\d,]+)\\]", line)[1])
"""


@pytest.mark.tpu_aot
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs the extra tpu")
@pytest.mark.parametrize(
    ("topology", "mesh", "queries"),
    [
        # A device has two rows of the four and two heads of the four, or half of the queries.
        ("v5e:2x2", {"data": 2, "fsdp": 1, "context": 1, "tensor": 2}, "2,2,1024,128"),
        ("v6e:2x2", {"data": 2, "fsdp": 1, "context": 1, "tensor": 2}, "2,2,1024,128"),
        ("v5e:2x2", {"data": 2, "fsdp": 1, "context": 2, "tensor": 1}, "2,4,512,128"),
    ],
)
def test_a_train_step_holds_the_kernels(topology, mesh, queries):
    check(STEP, "rope", topology, mesh, queries)


@pytest.mark.tpu_aot
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs the extra tpu")
@pytest.mark.parametrize("topology", ["v5e:2x2", "v5p:2x2x1"])
def test_tokens_in_any_order_hold_the_kernels(topology):
    mesh = {"data": 2, "fsdp": 1, "context": 2, "tensor": 1}
    check(GRADIENT, "alibi", topology, mesh, "2,4,512,128")


@pytest.mark.tpu_aot
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs the extra tpu")
@pytest.mark.parametrize(
    ("form", "queries"), [("ring", "2,4,512,128"), ("all_to_all", "2,2,1024,128")]
)
def test_rows_that_devices_share_hold_the_kernels(form, queries):
    """Half of the queries, or half of the heads."""
    mesh = {"data": 2, "fsdp": 1, "context": 2, "tensor": 1}
    check(STEP, "rope", "v5e:2x2", mesh, queries, form)


def check(program, encoding, topology, mesh, queries, implementation="auto"):
    """Both kernels are there, and of these queries."""
    setup = SETUP.replace("TOPOLOGY", topology).replace("MESH", repr(mesh))
    setup = setup.replace("ENCODING", encoding).replace("IMPLEMENTATION", implementation)
    program = setup + program + PRINT
    command = [sys.executable, "-c", program]
    run = subprocess.run(
        command, env=environment(os.environ), capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert set(run.stdout.splitlines()) == {f"forward {queries}", f"backward {queries}"}

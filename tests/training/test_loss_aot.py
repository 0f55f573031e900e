"""A train step for absent TPUs holds the loss's kernels, one for each device's rows."""

import os
import re
import subprocess
import sys

import pytest

from launch.aot.hlo import collectives
from launch.aot.hlo_text import parse
from launch.aot.topology import environment
from tests.kernels.aot import needs_libtpu

STEP = """
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

mesh = pod_mesh("v5e:2x2", MESH)
config = jaxlm.ModelConfig(
    vocab_size=VOCAB, num_layers=1, d_model=256, context_length=256, position_encoding="rope",
    attention=jaxlm.AttentionConfig(
        num_heads=2, num_kv_heads=2, head_dim=128, implementation="IMPLEMENTATION"
    ),
    embedding=jaxlm.EmbeddingConfig(tied=TIED),
    numerics=jaxlm.NumericsConfig(dtype="bfloat16"),
)
model, train = jaxlm.Transformer(config), TrainConfig(steps=2)
optimizer = make_optimizer(train.optimizer, 2)
shapes = abstract_state(placed_params(model, mesh), optimizer, train, mesh)
rows = batch_sharding(mesh, 8, 256)
names = ("tokens", "targets", "positions", "segment_ids")
batch = {n: jax.ShapeDtypeStruct((8, 256), jnp.int32, sharding=rows) for n in names}
batch["loss_weights"] = jax.ShapeDtypeStruct((8, 256), jnp.float32, sharding=rows)
step = compile_step(make_train_step(model, optimizer, train), shapes)
with jax.set_mesh(mesh):  # nothing may run: there are no such devices
    print(step.lower(shapes, batch).compile().as_text())
"""


@pytest.mark.tpu_aot
@needs_libtpu
@pytest.mark.parametrize(
    ("mesh", "kernels"),
    [
        # A device has two rows of 256 tokens of the eight, and all of the head.
        (
            {"data": 4, "fsdp": 1, "context": 1, "tensor": 1},
            {"forward 1000,256 512,256", "backward 1000,256 512,256"},
        ),
        (
            {"data": 2, "fsdp": 2, "context": 1, "tensor": 1},
            {"forward 1000,256 512,256", "backward 1000,256 512,256"},
        ),
        # Or four of 128.
        (
            {"data": 2, "fsdp": 1, "context": 2, "tensor": 1},
            {"forward 1000,256 512,256", "backward 1000,256 512,256"},
        ),
        # The head is cut along the vocabulary: XLA's form keeps it cut.
        ({"data": 2, "fsdp": 1, "context": 1, "tensor": 2}, set()),
    ],
)
def test_a_train_step_holds_the_kernels(mesh, kernels):
    text, found = compiled_step(mesh, vocab=1000, tied=False), set()
    for name in ("forward", "backward"):
        for line in text.splitlines():
            if "tpu_custom_call" in line and f"cross_entropy_{name}" in line:
                shapes = re.findall(r"bf16\[([\d,]+)\]", line)
                found.add(" ".join([name, *sorted(set(shapes))]))
    assert found == kernels


@pytest.mark.tpu_aot
@needs_libtpu
def test_each_chip_gets_its_part_of_the_heads_gradient():
    """No chip gets the sum of all of it. (Of a tied head, cut along its last axis, it does: there
    libtpu 0.0.42 makes an all-reduce and a slice of the reduce-scatter.)
    """
    text = compiled_step({"data": 1, "fsdp": 4, "context": 1, "tensor": 1}, vocab=1024, tied=False)
    assert "cross_entropy_backward" in text
    # With others in one operation, perhaps.
    shares = [c.nbytes for c in collectives(parse(text)) if c.kind == "reduce-scatter"]
    assert max(shares) >= 1024 * 256 * 2
    assert not re.findall(r"= bf16\[(?:1024,256|256,1024)\]\S* all-reduce\(", text)


@pytest.mark.tpu_aot
@needs_libtpu
def test_a_tied_head_is_read_as_the_embedding_lies():
    """Nothing turns it, nor its gradient."""
    text = compiled_step({"data": 4, "fsdp": 1, "context": 1, "tensor": 1}, vocab=1024, tied=True)
    assert "cross_entropy_backward" in text
    assert not re.findall(r"\[(?:1024,256|256,1024)\]\S* (?:copy|transpose)\(", text)


@pytest.mark.tpu_aot
@needs_libtpu
def test_a_train_step_leaves_out_blocks():
    """By the kernels, of each device's rows and heads."""
    mesh = {"data": 2, "fsdp": 1, "context": 1, "tensor": 2}
    text = compiled_step(mesh, vocab=1024, tied=False, implementation="block_sampled(128)")
    for name in ("forward", "dq", "dkv"):
        assert re.search(rf"bf16\[4,1,\d+,128\].*block_sampled_attention_{name}", text), name


def compiled_step(mesh, vocab, tied, implementation="auto"):
    """The text of a train step on four chips."""
    step = STEP.replace("MESH", repr(mesh)).replace("VOCAB", str(vocab)).replace("TIED", str(tied))
    step = step.replace("IMPLEMENTATION", implementation)
    run = subprocess.run(
        [sys.executable, "-c", step],
        env=environment(os.environ),
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return run.stdout

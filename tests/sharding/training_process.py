"""To be run on sixteen devices: runs on the meshes named; prints what became of it as JSON."""

import json
import math
import sys
from pathlib import Path

import jax

from jaxlm.checkpoints import Saver, tree_digest
from jaxlm.model.parameters import placed_params
from jaxlm.sharding.mesh import AXES, MeshConfig, batch_sharding
from jaxlm.training.config import OptimizerConfig, TrainConfig
from jaxlm.training.loop import compile_step
from jaxlm.training.optimizers import make_optimizer
from jaxlm.training.state import abstract_state, init_state
from jaxlm.training.step import make_train_step
from tests.training.cases import make_batch, make_model

# (model, mesh) of each run, on two, four, eight and all of the sixteen devices.
RUNS = {
    "data": ("plain", MeshConfig(data=2)),
    "fsdp": ("plain", MeshConfig(data=1, fsdp=4)),
    "all": ("plain", MeshConfig(data=2, fsdp=2, tensor=2)),
    "experts": ("experts", MeshConfig(data=2, fsdp=2, context=2, tensor=2)),
}
ROWS, LENGTH = 16, 12
# 40 is divided by tensor = 2.
MODEL = {"vocab_size": 40, "dropout": 0.1}
KINDS = {
    "plain": make_model("plain", **MODEL),
    "experts": make_model("experts", **MODEL, attention={"num_heads": 2}),  # blockwise
}


CONFIG = TrainConfig(
    steps=10,
    loss_chunk=4,
    microbatches=2,
    ema_decay=0.9,
    optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=1),
)


def mesh_of(config):
    """The mesh on as many devices as it takes."""
    sizes = config.data, config.fsdp, config.context, config.tensor
    types = (jax.sharding.AxisType.Auto,) * len(AXES)
    return jax.make_mesh(sizes, AXES, types, devices=jax.devices()[: math.prod(sizes)])


def three_steps(kind, mesh):
    """Shapes with shardings, the state after three steps, losses, SHA-256 of the first state."""
    model = KINDS[kind]
    optimizer = make_optimizer(CONFIG.optimizer, CONFIG.steps)
    shapes = abstract_state(placed_params(model, mesh), optimizer, CONFIG, mesh)
    shardings = jax.tree.map(lambda x: x.sharding, shapes)
    state = jax.jit(lambda: init_state(model, optimizer, CONFIG), out_shardings=shardings)()
    begun = tree_digest(state)["whole"]
    step = compile_step(make_train_step(model, optimizer, CONFIG), shapes)
    losses = []
    for seed in range(3):
        rows = batch_sharding(mesh, ROWS, LENGTH)
        batch = jax.device_put(make_batch(seed, ROWS, LENGTH), rows)
        with jax.set_mesh(mesh):
            state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    return shapes, state, losses, begun


def cuts(state) -> dict[str, int]:
    """Into how many parts each leaf is cut, as its shards on the devices show."""
    found = {}
    for path, x in jax.tree_util.tree_leaves_with_path(state):
        (part,) = {s.data.size for s in x.addressable_shards}
        found[jax.tree_util.keystr(path, simple=True, separator="/")] = x.size // part
    return found


def main(directory: str, *names: str) -> None:
    assert jax.device_count() == 16
    results = {}
    for name in names:
        kind, config = RUNS[name]
        _, state, losses, begun = three_steps(kind, mesh_of(config))
        results[name] = {"losses": losses, "cuts": cuts(state), "begun": begun}
        with Saver(Path(directory, name)) as saver:
            saver.save(3, state)
    print(json.dumps(results))


if __name__ == "__main__":
    main(*sys.argv[1:])

"""To be run on eight devices: runs on several meshes; prints what became of it as JSON."""

import itertools
import json
import sys
from pathlib import Path

import jax

from jaxlm.checkpoints import Saver, restore
from jaxlm.model.parameters import placed_params
from jaxlm.sharding.mesh import MeshConfig, batch_sharding, make_mesh
from jaxlm.training.config import OptimizerConfig, TrainConfig
from jaxlm.training.loop import compile_step
from jaxlm.training.optimizers import make_optimizer
from jaxlm.training.state import abstract_state, init_state
from jaxlm.training.step import make_train_step
from tests.checkpoints.states import assert_same_bytes
from tests.training.cases import make_batch, make_model

# (model, mesh) of each run.
RUNS = {
    "data": ("plain", MeshConfig(data=8)),
    "fsdp": ("plain", MeshConfig(data=1, fsdp=8)),
    "all": ("plain", MeshConfig(data=2, fsdp=2, tensor=2)),
    "experts": ("experts", MeshConfig(data=2, fsdp=2, tensor=2)),
    "context": ("experts", MeshConfig(data=2, context=2, tensor=2)),
    "ring": ("ring", MeshConfig(data=4, context=2)),
}
ROWS, LENGTH = 16, 12
# 40 is divided by tensor = 2.
MODEL = {"vocab_size": 40, "dropout": 0.1}
KINDS = {
    "plain": make_model("plain", **MODEL),
    "experts": make_model("experts", **MODEL, attention={"num_heads": 2}),  # blockwise
    "ring": make_model(**MODEL, attention={"num_heads": 2, "implementation": "ring"}),
}


CONFIG = TrainConfig(
    steps=10,
    loss_chunk=4,
    microbatches=2,
    ema_decay=0.9,
    optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=1),
)


def three_steps(kind, mesh):
    """(shapes with shardings, the state after three steps, the losses)."""
    model = KINDS[kind]
    optimizer = make_optimizer(CONFIG.optimizer, CONFIG.steps)
    shapes = abstract_state(placed_params(model, mesh), optimizer, CONFIG, mesh)
    shardings = jax.tree.map(lambda x: x.sharding, shapes)
    state = jax.jit(lambda: init_state(model, optimizer, CONFIG), out_shardings=shardings)()
    step = compile_step(make_train_step(model, optimizer, CONFIG), shapes)
    losses = []
    for seed in range(3):
        rows = batch_sharding(mesh, ROWS, LENGTH)
        batch = jax.device_put(make_batch(seed, ROWS, LENGTH), rows)
        with jax.set_mesh(mesh):
            state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    return shapes, state, losses


def cuts(state) -> dict[str, int]:
    """Into how many parts each leaf is cut, as its shards on the devices show."""
    found = {}
    for path, x in jax.tree_util.tree_leaves_with_path(state):
        (part,) = {s.data.size for s in x.addressable_shards}
        assert len(x.addressable_shards) == 8
        found[jax.tree_util.keystr(path, simple=True, separator="/")] = x.size // part
    return found


def main(directory: str) -> None:
    assert jax.device_count() == 8
    results, shapes, saved = {}, {}, {}
    for name, (kind, config) in RUNS.items():
        shapes[name], state, losses = three_steps(kind, make_mesh(config))
        results[name] = {"losses": losses, "cuts": cuts(state)}
        saved[name] = jax.device_get(state)
        with Saver(Path(directory, name)) as saver:
            saver.save(3, state)
    for source, target in itertools.product(RUNS, RUNS):
        if RUNS[source][0] != RUNS[target][0]:
            continue
        restored = restore(Path(directory, source), shapes[target]).state
        for x, like in zip(jax.tree.leaves(restored), jax.tree.leaves(shapes[target]), strict=True):
            assert x.sharding.is_equivalent_to(like.sharding, x.ndim)
        assert_same_bytes(jax.device_get(restored), saved[source])
    print(json.dumps(results))


if __name__ == "__main__":
    main(sys.argv[1])

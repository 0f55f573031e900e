"""A training state of a model of experts, and the meshes of eight devices that it is cut over.

There is no mesh axis for experts yet (RULES["expert"] is None in jaxlm/sharding/mesh.py): they are
cut by their other axes, along tensor and fsdp.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from jaxlm.model.parameters import placed_params
from jaxlm.sharding.mesh import MeshConfig, make_mesh
from jaxlm.training.config import TrainConfig
from jaxlm.training.optimizers import make_optimizer
from jaxlm.training.state import abstract_state
from tests.training.cases import make_model

MESHES = {
    "data": MeshConfig(data=8),
    "fsdp": MeshConfig(data=1, fsdp=8),
    "tensor": MeshConfig(data=1, fsdp=4, tensor=2),
}
PLACES = ("one", *MESHES)


def shapes(place: str) -> dict[str, Any]:
    """What is restored: on the mesh of this name, or on "one" device."""
    mesh = make_mesh(MESHES.get(place, MeshConfig()))
    config = TrainConfig(ema_decay=0.9)
    model = make_model("experts", vocab_size=40)  # a number that tensor=2 divides
    optimizer = make_optimizer(config.optimizer, config.steps)
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 8))
    along = NamedSharding(mesh, PartitionSpec(("fsdp", "tensor")))
    tree = {
        "train": abstract_state(placed_params(model, mesh), optimizer, config, mesh),
        "keys": jax.ShapeDtypeStruct(keys.shape, keys.dtype, sharding=along),
        "half": jax.ShapeDtypeStruct((16, 3), jnp.bfloat16, sharding=along),
    }
    if place != "one":
        return tree
    last = SingleDeviceSharding(jax.devices()[-1])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=last), tree)


def state(like: dict[str, Any]) -> dict[str, Any]:
    """Any bits at all, NaNs among them, placed as `like` says."""
    generator = np.random.default_rng(0)

    def bits(x: Any) -> jax.Array:
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            keys = generator.integers(0, 2**32, (*x.shape, 2), np.uint32)
            return jax.device_put(jax.random.wrap_key_data(keys), x.sharding)
        number = generator.integers(0, 256, x.size * x.dtype.itemsize, np.uint8)
        return jax.device_put(number.view(x.dtype).reshape(x.shape), x.sharding)

    return jax.tree.map(bits, like)

"""A state cut as a model of experts is, and the meshes of eight devices that it lies on.

RULES in jaxlm/sharding/mesh.py have no mesh axis for experts, which are cut by their other axes;
the mesh "expert" is one of a library that has: checkpoints know no rules. Models themselves are not
traced here, which would take most of the time; tests/sharding saves training states on meshes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from jaxlm.sharding.mesh import MeshConfig, make_mesh, parameter_sharding

MESHES = {
    "data": MeshConfig(data=8),
    "fsdp": MeshConfig(data=1, fsdp=8),
    "tensor": MeshConfig(data=1, fsdp=4, tensor=2),
}
PLACES = ("one", *MESHES, "expert")
SIZES = {"vocab": 40, "embed": 16, "mlp": 6, "expert": 4, "layers": 2, "heads": 2, "head_dim": 8}
AXES = {
    "embedding": ("vocab", "embed"),
    "out": ("layers", "heads", "head_dim", "embed"),
    "router": ("layers", "embed", "expert"),
    "up": ("layers", "expert", "embed", "mlp"),
    "down": ("layers", "expert", "mlp", "embed"),
}


def cut(place: str) -> tuple[Mesh, Callable[[str, tuple[int, ...]], NamedSharding]]:
    """The mesh of this name, and how it cuts a parameter of a name and a shape."""
    if place == "expert":
        mesh = jax.make_mesh((2, 4), ("data", "expert"), (AxisType.Auto,) * 2)
        experts = {name: [a if a == "expert" else None for a in AXES[name]] for name in AXES}
        return mesh, lambda name, _: NamedSharding(mesh, PartitionSpec(*experts[name]))
    mesh = make_mesh(MESHES.get(place, MeshConfig()))
    return mesh, lambda name, shape: parameter_sharding(
        mesh, name, PartitionSpec(*AXES[name]), shape
    )


def shapes(place: str) -> dict[str, Any]:
    """What is restored: on the mesh of this name, or on "one" device."""
    mesh, sharding = cut(place)

    def parameter(name: str, dtype: Any) -> jax.ShapeDtypeStruct:
        shape = tuple(SIZES[axis] for axis in AXES[name])
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding(name, shape))

    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 8))
    along = NamedSharding(mesh, PartitionSpec(mesh.axis_names[1:]))
    tree = {
        "params": {name: parameter(name, jnp.float32) for name in AXES},
        "moments": {name: parameter(name, jnp.bfloat16) for name in AXES},
        "keys": jax.ShapeDtypeStruct(keys.shape, keys.dtype, sharding=along),
        "step": jax.ShapeDtypeStruct((), jnp.int32, sharding=NamedSharding(mesh, PartitionSpec())),
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

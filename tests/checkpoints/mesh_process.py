"""Eight simulated devices: save on each mesh, restore on each other; all files equal."""

import os
import sys

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import itertools
from pathlib import Path

import jax
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from jaxlm.checkpoints import Saver, restore, tree_digest
from tests.checkpoints.states import assert_same_bytes, cut_state

STATE = cut_state()


def shardings() -> dict:
    fsdp = jax.make_mesh((8,), ("fsdp",))
    both = jax.make_mesh((2, 4), ("tensor", "fsdp"))
    return {
        "one": dict.fromkeys(STATE, SingleDeviceSharding(jax.devices()[3])),
        "replicated": dict.fromkeys(STATE, NamedSharding(fsdp, PartitionSpec())),
        "fsdp": dict.fromkeys(STATE, NamedSharding(fsdp, PartitionSpec("fsdp"))),
        "both": {
            "w": NamedSharding(both, PartitionSpec("fsdp", "tensor")),
            "b": NamedSharding(both, PartitionSpec(("tensor", "fsdp"))),
            "keys": NamedSharding(both, PartitionSpec("tensor")),
        },
    }


def main(directory: str) -> None:
    assert jax.device_count() == 8
    meshes = shardings()
    for name, sharding in meshes.items():
        with Saver(Path(directory, name)) as saver:
            saver.save(1, jax.device_put(STATE, sharding))
    for source, target in itertools.product(meshes, meshes):
        abstract = {
            k: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=meshes[target][k])
            for k, x in STATE.items()
        }
        restored = restore(Path(directory, source), abstract)
        for k, x in restored.state.items():
            assert x.sharding.is_equivalent_to(meshes[target][k], x.ndim)
        assert_same_bytes(jax.device_get(restored.state), jax.device_get(STATE))
        assert restored.digest == tree_digest(STATE)["whole"]
    print("pairs:", len(meshes) ** 2)


if __name__ == "__main__":
    main(sys.argv[1])

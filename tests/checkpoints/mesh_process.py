"""Eight simulated devices: restores each step of DIRECTORY on each mesh, to the same bits.

python -m tests.checkpoints.mesh_process DIRECTORY

If it is empty, each step is first saved on a mesh of its own.
"""

import os
import sys

os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)

import jax

from jaxlm.checkpoints import Saver, available_steps, restore
from tests.checkpoints.placed import PLACES, shapes, state
from tests.checkpoints.states import assert_same_bytes


def main(directory: str) -> None:
    assert jax.device_count() == 8
    likes = {place: shapes(place) for place in PLACES}
    if not available_steps(directory):
        with Saver(directory, keep_last=len(PLACES)) as saver:
            for step, like in enumerate(likes.values(), 1):
                saver.save(step, state(like))
    want = jax.device_get(state(likes["one"]))
    for step in available_steps(directory):
        for place, like in likes.items():
            restored = restore(directory, like, step=step).state
            for x, asked in zip(jax.tree.leaves(restored), jax.tree.leaves(like), strict=True):
                assert x.sharding.is_equivalent_to(asked.sharding, x.ndim)
            assert_same_bytes(jax.device_get(restored), want)
            print(step, place)


if __name__ == "__main__":
    main(sys.argv[1])

"""One of several processes: restores each step of SOURCE onto devices of all, saves it in TARGET.

python -m tests.checkpoints.several_processes COORDINATOR COUNT INDEX SOURCE TARGET
"""

import os
import sys

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"

from pathlib import Path

import jax
from jax.sharding import NamedSharding, PartitionSpec

from jaxlm.checkpoints import Saver, available_steps, restore
from tests.checkpoints.states import cut_state

CUTS = {"w": PartitionSpec("fsdp", "tensor"), "b": PartitionSpec(), "keys": PartitionSpec("fsdp")}


def main(coordinator: str, count: str, index: str, source: str, target: str) -> None:
    jax.distributed.initialize(coordinator, int(count), int(index))
    mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"))
    abstract = {
        k: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, CUTS[k]))
        for k, x in jax.eval_shape(cut_state).items()
    }
    with Saver(Path(target)) as saver:
        for step in available_steps(source):
            restored = restore(source, abstract, step=step)
            for k, x in restored.state.items():
                assert not x.is_fully_addressable and x.sharding.spec == CUTS[k]
            saver.save(step, restored.state, metadata={"by": int(index)})
    newest = restore(target, abstract)
    print("newest:", newest.step, "by:", newest.metadata.get("by"), *newest.refused)


if __name__ == "__main__":
    main(*sys.argv[1:])

"""One of several processes: restores each step of SOURCE onto devices of all, saves it in TARGET.

python -m tests.checkpoints.several_processes COORDINATOR COUNT INDEX SOURCE TARGET
"""

import os
import sys

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"

from pathlib import Path

import jax

from jaxlm.checkpoints import Saver, available_steps, restore
from tests.checkpoints.placed import PLACES, shapes


def main(coordinator: str, count: str, index: str, source: str, target: str) -> None:
    jax.distributed.initialize(coordinator, int(count), int(index))
    like = shapes("tensor")
    with Saver(Path(target), keep_last=len(PLACES)) as saver:
        for step in available_steps(source):
            restored = restore(source, like, step=step)
            for x, asked in zip(
                jax.tree.leaves(restored.state), jax.tree.leaves(like), strict=True
            ):
                assert not x.is_fully_addressable
                assert x.sharding.is_equivalent_to(asked.sharding, x.ndim)
            saver.save(step, restored.state, metadata={"by": int(index)})
    newest = restore(target, like)
    print("newest:", newest.step, "by:", newest.metadata.get("by"), *newest.refused)


if __name__ == "__main__":
    main(*sys.argv[1:])

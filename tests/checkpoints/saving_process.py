"""A process to be killed: restores the newest step, then saves as fast as it can."""

import sys

from jaxlm.checkpoints import Saver, available_steps, restore, workdir_lock
from tests.checkpoints.states import assert_same_bytes, state_at

WIDTH = 20_000


def main(directory: str) -> None:
    step = 0
    with workdir_lock(directory), Saver(directory, keep_last=2, keep_every=50) as saver:
        if available_steps(directory):
            restored = restore(directory, state_at(0, WIDTH))
            step = restored.step
            assert_same_bytes(restored.state, state_at(step, WIDTH))
        state_at(step, WIDTH)  # compiled before the clock starts
        print("ready", flush=True)
        while True:
            step += 1
            saver.save(step, state_at(step, WIDTH), files={"tokenizer/t.json": b"{}" * step})
            saver.wait()
            print(step, flush=True)


if __name__ == "__main__":
    main(sys.argv[1])

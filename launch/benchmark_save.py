"""What saving costs the steps beside it, and what SHA-256s cost a restore."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from jaxlm.checkpoints import Saver, available_steps, restore


def measure(run: Callable[[], Any], state: Callable[[], Any], rounds: int) -> dict[str, Any]:
    """Saves while steps go on, and takes as many steps without; on the disk of temporary files.

    Args:
        run: one step of training.
        state: what the last step left.
        rounds: saves; the figures are medians of them.

    Returns:
        bytes of the state; milliseconds of a step alone; seconds of a save beside steps, and that
        it adds to them; which share of a minute that is, where there is a save a minute; and of the
        last save what `restore_figures` says.
    """
    run()
    alone, saves, added = [], [], []
    with tempfile.TemporaryDirectory() as folder, Saver(Path(folder), keep_last=1) as saver:
        for number in range(rounds + 1):
            began, steps = time.perf_counter(), 0
            saver.save(number, state())
            while not steps or number not in available_steps(folder):
                run()
                steps += 1
            saver.wait()  # until the save before is deleted
            took = time.perf_counter() - began
            began = time.perf_counter()
            for _ in range(steps):
                run()
            without = time.perf_counter() - began
            if number:  # the first save loads libraries
                alone.append(without / steps)
                saves.append(took)
                added.append(took - without)
        of_restore = restore_figures(Path(folder), rounds, rounds)
    return {
        "benchmark": "save",
        "state MiB": sum(x.nbytes for x in jax.tree.leaves(state())) / 2**20,
        "ms a step": 1e3 * statistics.median(alone),
        "seconds of a save": statistics.median(saves),
        "seconds added": statistics.median(added),
        "of a minute": statistics.median(added) / 60,
        **of_restore,
    }


def restore_figures(directory: Path, step: int, rounds: int) -> dict[str, float]:
    """Restores a step to the host, verified and not, in turn. Its files were just written and lie
    in memory: from a disk, reading takes longer and the share is smaller.

    Returns:
        seconds of a restore, and the share of it that SHA-256s add; medians.
    """
    restores, shares = [], []
    for _ in range(rounds + 1):  # the first warms up
        took = {}
        for verify in (True, False):
            began = time.perf_counter()
            restore(directory, step=step, verify=verify)
            took[verify] = time.perf_counter() - began
        restores.append(took[True])
        shares.append(1 - took[False] / took[True])
    return {
        "seconds of a restore": statistics.median(restores[1:]),
        "of it SHA-256": statistics.median(shares[1:]),
    }

"""kill -9 at random instants of a process that does nothing but save."""

import os
import random
import subprocess
import sys
import time

import pytest

from jaxlm.checkpoints import available_steps, restore
from tests.checkpoints.saving_process import WIDTH
from tests.checkpoints.states import assert_same_bytes, state_at


def half_written(directory) -> list[str]:
    return [name for name in os.listdir(directory) if name.endswith(".tmp")]


def kill_once(directory, delay: float, within: bool) -> int:
    """Start, kill after `delay` seconds of saving, or as soon after as a save is `within` its
    writing; the last step that it said was saved.
    """
    command = [sys.executable, "-m", "tests.checkpoints.saving_process", str(directory)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"ready\n", process.stderr.read().decode()
        time.sleep(delay)
        while within and not half_written(directory) and process.poll() is None:
            pass
        process.kill()
        lines = process.stdout.read().split(b"\n")[:-1]
        assert process.wait() == -9, process.stderr.read().decode()
    return int(lines[-1]) if lines else 0


@pytest.mark.parametrize("kills", [4, pytest.param(200, marks=pytest.mark.slow)])
def test_nothing_that_was_saved_is_lost(tmp_path, kills):
    generator = random.Random(0)
    said, halves = 0, 0
    for kill in range(kills):
        said = max(said, kill_once(tmp_path, generator.uniform(0.0, 0.5), within=kill % 2 == 1))
        halves += bool(half_written(tmp_path))
        # No step is ever there in part: whatever has a step's name is good.
        steps = available_steps(tmp_path)
        assert (steps or [0])[-1] >= said
        for step in steps:
            restored = restore(tmp_path, state_at(0, WIDTH), step=step)
            assert_same_bytes(restored.state, state_at(step, WIDTH))
    assert said > 0
    assert halves > 0  # else the kills missed the saves, and this test shows nothing

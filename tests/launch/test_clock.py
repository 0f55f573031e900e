"""The wall clock jumps, under real processes: only file names and logs know what time it is."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from jaxlm.checkpoints import WorkdirLockedError, available_steps, restore, workdir_lock
from jaxlm.training.metrics import read_metrics
from tests.launch.processes import what_a_run_determines

YEAR = 365 * 24 * 3600
HOLDER = """
import sys, time
from jaxlm.checkpoints import workdir_lock
with workdir_lock(sys.argv[1]):
    print(time.time(), flush=True)
    time.sleep(60)
"""


@pytest.fixture(scope="module")
def shim(tmp_path_factory):
    """Environment variables that shift the clock by so many seconds."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler: the clock of a process can't be shifted")
    library = tmp_path_factory.mktemp("shim") / "clock.so"
    source = Path(__file__).parent / "clock_shim.c"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, source], check=True)
    return lambda seconds: {"LD_PRELOAD": str(library), "CLOCK_SHIFT": str(seconds)}


@pytest.mark.slow
def test_a_clock_set_back_a_year_between_two_starts_changes_no_bit(
    launcher, reference, shim, tmp_path
):
    launcher.kill(tmp_path, lambda: available_steps(tmp_path / "checkpoints"))
    began = available_steps(tmp_path / "checkpoints")[-1]
    finished = launcher.train(tmp_path, env=shim(-YEAR))
    assert finished.returncode == 0, finished.stderr
    assert f"going on from step {began} of " in finished.stderr
    assert restore(tmp_path / "checkpoints").digest == restore(reference[0] / "checkpoints").digest
    assert what_a_run_determines(tmp_path) == what_a_run_determines(reference[0])
    speeds = [value for r in read_metrics(tmp_path) for value in r.get("speed", {}).values()]
    assert speeds and min(speeds) >= 0


def test_the_age_of_a_lock_from_the_future_is_not_told(shim, tmp_path):
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    pipes = {"stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=os.environ | shim(YEAR), **pipes) as holder:
        try:
            ahead = float(holder.stdout.readline())
            told = f"process {holder.pid} on .* .since when is unknown: clocks differ.;"
            with pytest.raises(WorkdirLockedError, match=told), workdir_lock(tmp_path):
                pass
        finally:
            holder.send_signal(signal.SIGKILL)
    assert ahead > (tmp_path / "lock").stat().st_mtime + YEAR / 2  # the shim did something

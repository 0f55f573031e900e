"""--deterministic: what XLA is told before it starts, and runs that repeat themselves."""

import json
import subprocess
import sys

import pytest

from jaxlm.checkpoints import restore
from launch.determinism import XLA_FLAGS
from tests.launch.processes import what_a_run_determines

TELLS = """
import json, os, sys
from absl import app
from launch import determinism
def main(_):
    determinism.start()
    import jax
    jax.devices()  # an XLA flag that no backend knows would end the process here
    print(json.dumps(os.environ["XLA_FLAGS"].split()))
app.run(main)
"""


def tells(env, *arguments):
    command = [sys.executable, "-c", TELLS, *arguments]
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False)


def test_xla_is_told_before_it_starts_and_keeps_what_it_was_told(launcher):
    own = "--xla_cpu_enable_fast_math=false"
    told = tells(launcher.env | {"XLA_FLAGS": own}, "--deterministic")
    assert told.returncode == 0, told.stderr
    assert json.loads(told.stdout) == [own, *XLA_FLAGS]
    told = tells(launcher.env | {"XLA_FLAGS": own})
    assert json.loads(told.stdout) == [own]


def test_flags_that_say_otherwise_are_refused(launcher, tmp_path):
    flag = "--xla_gpu_autotune_level=4"
    refused = launcher.train(tmp_path, "--deterministic", env={"XLA_FLAGS": flag})
    assert refused.returncode == 1
    said = f"error: XLA_FLAGS has {flag}; allowed with --deterministic: {XLA_FLAGS[1]}"
    assert refused.stderr.splitlines() == [said]


@pytest.mark.slow
def test_on_a_cpu_it_changes_nothing(launcher, reference, tmp_path):
    finished = launcher.train(tmp_path, "--deterministic")
    assert finished.returncode == 0, finished.stderr
    assert restore(tmp_path / "checkpoints").digest == restore(reference[0] / "checkpoints").digest
    assert what_a_run_determines(tmp_path) == what_a_run_determines(reference[0])

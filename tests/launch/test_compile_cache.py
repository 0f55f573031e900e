"""A damaged cache of compiled programs costs time, and changes nothing else, where JAX sees that it
is damaged. It keeps no checksum of an entry that zstandard has compressed: of a single flipped bit
nothing can be promised, and none is tested.
"""

import os
import shutil
from pathlib import Path

import pytest

from jaxlm.checkpoints import restore
from tests.launch.processes import what_a_run_determines
from tests.marks import slow_but


def truncate(path: Path):
    os.truncate(path, path.stat().st_size // 2)


def empty(path: Path):
    os.truncate(path, 0)


def garbage(path: Path):
    path.write_bytes(os.urandom(path.stat().st_size))


@pytest.mark.parametrize("damage", slow_but([truncate], [truncate, empty, garbage]))
def test_the_run_goes_on_and_is_the_same(launcher, reference, tmp_path, damage):
    cache = tmp_path / "compiled"
    shutil.copytree(launcher.env["JAX_COMPILATION_CACHE_DIR"], cache)
    entries = sorted(cache.glob("*-cache"))
    assert entries
    for entry in entries:
        damage(entry)
    workdir = tmp_path / "run"
    finished = launcher.train(workdir, env={"JAX_COMPILATION_CACHE_DIR": str(cache)})
    assert finished.returncode == 0, finished.stderr
    assert "Error reading persistent compilation cache entry" in finished.stderr
    assert restore(workdir / "checkpoints").digest == restore(reference[0] / "checkpoints").digest
    assert what_a_run_determines(workdir) == what_a_run_determines(reference[0])

"""Saved on any mesh, restored on any other, by one process, by two and as NumPy: equal bits."""

import subprocess
import sys

import jax
import pytest

from jaxlm.checkpoints import available_steps, load_numpy, restore, tree_digest
from jaxlm.checkpoints.layout import step_folder
from tests.checkpoints.placed import PLACES, shapes, state
from tests.checkpoints.states import assert_same_bytes
from tests.checkpoints.test_save_restore import all_files
from tests.checkpoints.test_several_processes import two_processes

STEPS = list(range(1, len(PLACES) + 1))


def on_each_mesh(directory):
    """Restores each step on each mesh of eight devices of one process; saves them if there are
    none.
    """
    command = [sys.executable, "-W", "error", "-m", "tests.checkpoints.mesh_process", directory]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split("\n")[:-1] == [f"{n} {place}" for n in STEPS for place in PLACES]


@pytest.fixture(scope="module")
def of_one(tmp_path_factory):
    """Step n is saved by one process on mesh n, and was restored on each."""
    directory = tmp_path_factory.mktemp("one")
    on_each_mesh(directory)
    return directory


@pytest.fixture(scope="module")
def of_two(of_one, tmp_path_factory):
    """Each of these steps, restored and saved by two processes together."""
    directory = tmp_path_factory.mktemp("two")
    for status, out, err in two_processes(of_one, directory):
        assert status == 0, err
        assert f"newest: {STEPS[-1]} by: 0\n" in out  # the first process's metadata
    return directory


def test_one_process_leaves_no_trace_of_its_mesh(of_one):
    first, *others = [all_files(step_folder(of_one, step) / "state") for step in STEPS]
    assert others == [first] * len(others)


def test_two_processes_wrote_a_chunk_a_shard(of_two):
    chunks = (step_folder(of_two, 1) / "state" / "params.embedding").glob("[0-9]*")
    assert {p.name for p in chunks} == {f"{i}.{j}" for i in range(2) for j in range(4)}


def test_one_process_restores_on_each_mesh_what_two_saved(of_two):
    on_each_mesh(of_two)


def test_read_on_one_cpu_and_as_numpy(of_one, of_two):
    want = state(shapes("one"))
    for directory in (of_one, of_two):
        assert available_steps(directory) == STEPS
        for step in STEPS:
            restored = restore(directory, shapes("one"), step=step)
            assert_same_bytes(restored.state, want)
            assert restored.digest == tree_digest(want)["whole"]
            read = load_numpy(directory, step=step)
            params = jax.device_get(want["params"])
            assert_same_bytes(read["params"], params)
            assert read["keys"].tobytes() == jax.random.key_data(want["keys"]).tobytes()

"""What goes wrong where several processes save and restore: all say so (see test_meshes.py)."""

import os
import resource
import shutil
import socket
import subprocess
import sys

import pytest

from jaxlm.checkpoints import Saver
from jaxlm.checkpoints.layout import step_folder
from tests.checkpoints.placed import shapes, state


def two_processes(source, target, largest_file=None):
    """What each said, and its exit status; the second one's files are no larger than said."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        coordinator = f"localhost:{free.getsockname()[1]}"
    module = [sys.executable, "-m", "tests.checkpoints.several_processes", coordinator, "2"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    commands = [[*module, str(index), str(source), str(target)] for index in range(2)]
    processes = [subprocess.Popen(command, **pipes) for command in commands]
    if largest_file is not None:
        resource.prlimit(processes[1].pid, resource.RLIMIT_FSIZE, (largest_file, largest_file))
    said = [process.communicate(timeout=120) for process in processes]
    return [(p.returncode, *texts) for p, texts in zip(processes, said, strict=True)]


@pytest.fixture(scope="module")
def by_one(tmp_path_factory):
    """Two good steps, and a third that is damaged."""
    directory = tmp_path_factory.mktemp("one")
    with Saver(directory) as saver:
        for step in (1, 2):
            saver.save(step, state(shapes("one")))
    shutil.copytree(step_folder(directory, 2), step_folder(directory, 3))
    return directory


def test_all_fail_if_one_can_not_write(by_one, tmp_path):
    """And the older steps stay."""
    source, target = tmp_path / "source", tmp_path / "target"
    shutil.copytree(step_folder(by_one, 2), step_folder(source, 2))
    shutil.copytree(step_folder(by_one, 1), step_folder(target, 1))
    first, second = two_processes(source, target, largest_file=64)
    assert second[0] == 1 and "SaveError: step 2 was not saved in" in second[2]
    assert "File too large" in second[2]
    assert first[0] == 1 and "OtherProcessError: process 1 of 2: " in first[2]
    assert os.listdir(target) == ["step_00000001"]


@pytest.mark.slow
def test_all_fail_if_the_first_makes_no_folder(by_one, tmp_path):
    shutil.copytree(by_one, source := tmp_path / "source")
    shutil.rmtree(step_folder(source, 3))
    (tmp_path / "file").write_text("")
    (first, second) = two_processes(source, tmp_path / "file" / "steps")
    assert first[0] == 1 and "SaveError: step 1 was not saved in" in first[2]
    assert second[0] == 1 and "process 0 of 2: NotADirectoryError" in second[2]


def test_a_damaged_step_is_passed_over_by_all(by_one, tmp_path):
    """Both read it: the one that says so is right for both."""
    shutil.copytree(by_one, target := tmp_path / "target")
    shutil.copytree(by_one, source := tmp_path / "source")
    for step in (2, 3):
        shutil.rmtree(step_folder(source, step))
    for status, out, err in two_processes(source, target):
        assert status == 0, err
        assert "newest: 2" in out and "step 3 refused" in out
        assert "its manifest is that of step 2" in out

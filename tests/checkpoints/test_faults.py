"""Saves that can't be done: what is there stays, the error says why, nothing is left over."""

import contextlib
import functools
import os
import resource
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import pytest

from jaxlm.checkpoints import SaveError, Saver, available_steps, load_numpy


@contextlib.contextmanager
def file_size_limit(directory: Path):
    """No file may grow past 64 KiB: the kernel refuses the write as it does on a full disk."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


@contextlib.contextmanager
def full_disk(directory: Path, left: int = 0):
    """The rest of the (tiny) file system but so many bytes is taken by another file."""
    taken = directory.parent / "taken"
    with taken.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))
    os.truncate(taken, taken.stat().st_size - left)
    try:
        yield
    finally:
        taken.unlink()


@contextlib.contextmanager
def read_only(directory: Path):
    """Root may write anywhere, so it becomes nobody for a while."""
    directory.chmod(0o555)
    with contextlib.ExitStack() as undo:
        undo.callback(directory.chmod, 0o755)
        if os.geteuid() == 0:
            undo.callback(os.seteuid, 0)
            os.seteuid(65534)
        yield


@pytest.fixture
def folder():
    """Reachable for any user, unlike pytest's own temporary folders."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name) / "checkpoints"


@pytest.fixture
def tiny_disk(folder):
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder.parent],
        capture_output=True,
        text=True,
        check=False,
    )
    if mount.returncode:
        pytest.skip(f"can't mount a tmpfs here ({mount.stderr.strip()}); see the file size limit")
    yield folder
    subprocess.run(["umount", folder.parent], check=True)


def check_fault(directory, fault, reason):
    with Saver(directory) as saver:
        saver.save(1, {"a": np.full(1000, 1.0)})
        saver.wait()
        with fault(directory):
            # One array: TensorStore complains on stderr when two writes fail at once.
            saver.save(2, {"a": np.full(40_000, 2.0)})
            with pytest.raises(SaveError) as caught:
                saver.wait()
        text = str(caught.value)
        assert text.startswith(f"step 2 was not saved in {directory}: ")
        assert reason in text
        assert "It needs 320000 bytes; " in text
        assert text.endswith("The last saved step is 1.")
        assert os.listdir(directory) == ["step_00000001"]
        assert set(load_numpy(directory)["a"]) == {1.0}
        # The fault gone, the same Saver goes on.
        saver.save(3, {"a": np.full(1000, 3.0)})
    assert available_steps(directory) == [1, 3]


def test_file_too_large(folder):
    check_fault(folder, file_size_limit, "File too large")


# Without room for the array; and with room for it, but not for what else a step has.
@pytest.mark.parametrize("left", [0, 320_000 + 4096])
def test_disk_full(tiny_disk, left):
    check_fault(tiny_disk, functools.partial(full_disk, left=left), "No space left on device")


def test_read_only_folder(folder):
    check_fault(folder, read_only, "Permission denied")


def test_file_in_the_way(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    saver = Saver(tmp_path / "file" / "checkpoints")
    saver.save(1, {"a": 1})
    with pytest.raises(SaveError, match=r"Not a directory(.|\n)*No earlier step is saved"):
        saver.close()


def test_an_error_is_raised_by_the_next_save_too(folder):
    with Saver(folder) as saver, file_size_limit(folder):
        saver.save(1, {"a": np.zeros(20_000)})
        with pytest.raises(SaveError, match="step 1 was not saved"):
            saver.save(2, {"a": 1})
        saver.save(2, {"a": 1})
    assert available_steps(folder) == [2]

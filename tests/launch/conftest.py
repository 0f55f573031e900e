import pytest

from tests.launch.processes import Launcher
from tests.training.texts import write_texts


@pytest.fixture(scope="session")
def launcher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("launch")
    return Launcher(write_texts(folder / "texts"), folder / "compiled")


@pytest.fixture(scope="session")
def reference(launcher, tmp_path_factory):
    """(workdir, finished process) of a run that nobody disturbed; it fills the compile cache."""
    workdir = tmp_path_factory.mktemp("reference")
    finished = launcher.train(workdir)
    assert finished.returncode == 0, finished.stderr
    return workdir, finished

import subprocess
import sys

from jaxlm.checkpoints import load_numpy
from tests.checkpoints.test_save_restore import all_files


def test_saved_on_any_mesh_restored_on_any_other(tmp_path):
    command = [sys.executable, "-W", "error", "-m", "tests.checkpoints.mesh_process", str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout == "pairs: 16\n"
    # The mesh leaves no trace; and this process, with its one device, reads it as NumPy.
    for name in ("replicated", "fsdp", "both"):
        assert all_files(tmp_path / name) == all_files(tmp_path / "one")
    assert load_numpy(tmp_path / "both")["w"].tolist()[1] == [8, 9, 10, 11, 12, 13, 14, 15]

import os
import socket
import subprocess
import sys

import pytest

from jaxlm.checkpoints import WorkdirLockedError, workdir_lock

HOLDER = """
import sys, time
from jaxlm.checkpoints import workdir_lock
with workdir_lock(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


def test_second_writer_is_told_who_is_first_until_it_is_killed(tmp_path, caplog):
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        try:
            assert holder.stdout.readline() == "held\n"
            owner = f"process {holder.pid} on {socket.gethostname()} since "
            expected = pytest.raises(WorkdirLockedError, match=f"being written by {owner}")
            with expected, workdir_lock(tmp_path):
                pass
        finally:
            holder.kill()
    with workdir_lock(tmp_path):
        assert f"taking over the lock of {owner}" in caplog.text


def test_also_within_one_process(tmp_path):
    with (
        workdir_lock(tmp_path / "new"),
        pytest.raises(WorkdirLockedError, match=f"process {os.getpid()}"),
        workdir_lock(tmp_path / "new"),
    ):
        pass
    with workdir_lock(tmp_path / "new"):
        pass

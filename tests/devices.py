"""Programs that need several devices, which a CPU simulates in a process of its own."""

import os
import subprocess
import sys


def on_devices(count: int, module: str, *arguments: str) -> str:
    """What a module of the tests prints on so many devices; it must end well, without a warning."""
    command = [sys.executable, "-W", "error", "-m", module, *arguments]
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={count}"
    env = {**os.environ, "XLA_FLAGS": flags}
    run = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    return run.stdout

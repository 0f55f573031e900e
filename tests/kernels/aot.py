"""Compiles a kernel for an absent TPU."""

import tempfile
from pathlib import Path

from launch.aot.process import run_child


def compiles(name, kwargs, topology):
    """launch.kernel_programs_decode.name, in a process of its own; no profile, so it is quick."""
    function = f"launch.kernel_programs_decode:{name}"
    request = {"topology": topology, "function": function, "kwargs": kwargs}
    with tempfile.TemporaryDirectory() as folder:
        result = run_child(request, Path(folder), [], 300.0)
    assert "error" not in result, result["error"]

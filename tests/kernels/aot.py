"""Compiles a kernel for an absent TPU."""

import importlib.util
import tempfile
from pathlib import Path

import pytest

from launch.aot.process import run_child

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs the extra tpu"
)


def compiles(function, kwargs, topology):
    """launch.`function`, "module:name", in a process of its own; no profile, so it is quick."""
    request = {"topology": topology, "function": f"launch.{function}", "kwargs": kwargs}
    with tempfile.TemporaryDirectory() as folder:
        result = run_child(request, Path(folder), [], timeout=600)
    assert "error" not in result, result["error"]

"""Compiles a kernel for an absent TPU."""

import importlib.util
import tempfile
from pathlib import Path

import pytest

from launch.aot.cost import Memory
from launch.aot.hlo_text import parse
from launch.aot.process import run_child

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs the extra tpu"
)
TOPOLOGIES = ["v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"]
# Heads of models that people run, whole on one chip.
LIKE_8B = {"heads": 8, "query_heads": 32, "head_dim": 128}
LIKE_70B = {"heads": 8, "query_heads": 64, "head_dim": 128}


def compiles(function, kwargs, topology):
    """launch.`function`, "module:name", in a process of its own; no profile, so it is quick. Its
    memory and text.
    """
    request = {"topology": topology, "function": f"launch.{function}", "kwargs": kwargs}
    with tempfile.TemporaryDirectory() as folder:
        result = run_child(request, Path(folder), [], timeout=600)
        assert "error" not in result, result["error"]
        return Memory(*result["memory"]), parse((Path(folder) / "hlo.txt").read_text())

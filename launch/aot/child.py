"""Compiles one program for an absent TPU, in a process that the compiler may abort.

python -m launch.aot.child REQUEST FOLDER    with the environment of launch.aot.topology

REQUEST is JSON: {"topology": …, "function": "module:name", "kwargs": {…}}, without a function to
ask only for the devices. The function takes the mesh of one device, or of all with {"mesh": {axis:
size}}, and the kwargs; it returns a function, jitted or not, and the shapes of its arguments.
FOLDER gets result.json and, if it compiles, hlo.txt.
"""

from __future__ import annotations

import importlib
import json
import math
import re
import resource
import sys
from pathlib import Path
from typing import Any

import jax

from launch.aot import topology

# Of the memory that is free, what one process may take.
MEMORY_SHARE = 0.6
MEMORY = ("argument", "output", "alias", "temp")


def compile_one(request: dict[str, Any], folder: Path) -> dict[str, Any]:
    """HBM bytes by kind, and of the arguments by their first two names; or the error."""
    if "mesh" in request:
        mesh = topology.pod_mesh(request["topology"], request["mesh"])
    else:
        mesh = topology.one_device_mesh(request["topology"])
    module, _, name = request["function"].partition(":")
    try:
        make = getattr(importlib.import_module(module), name)
        function, arguments = make(mesh, **request["kwargs"])
        # Kernels that ask what chip they are compiled for learn it from the mesh.
        with jax.set_mesh(mesh):
            jitted = function if hasattr(function, "lower") else jax.jit(function)
            lowered = jitted.lower(*arguments)
        compiled = lowered.compile()
    except Exception as error:
        # Whatever a kernel or a compiler raises is a result: the case does not compile.
        return {"error": re.sub(r"\s+", " ", f"{type(error).__name__}: {error}")[:2000]}
    (folder / "hlo.txt").write_text(compiled.as_text() or "")
    memory = compiled.memory_analysis()
    sizes = [getattr(memory, f"{kind}_size_in_bytes") for kind in MEMORY]
    compiler = compiler_of(mesh.devices.flat[0])
    return {"memory": sizes, "held": held_bytes(arguments), "compiler": compiler}


def compiler_of(device: Any) -> str:
    """Its version."""
    return device.client.platform_version.splitlines()[-1]


def held_bytes(arguments: Any) -> dict[str, int]:
    """Bytes that one device holds of each argument's parts: {"0.params": …}."""
    held: dict[str, int] = {}
    for path, x in jax.tree_util.tree_leaves_with_path(arguments):
        if not isinstance(x, jax.ShapeDtypeStruct):  # what is static takes no room
            continue
        name = jax.tree_util.keystr(path[:2], simple=True, separator=".")
        shape = x.shape if x.sharding is None else x.sharding.shard_shape(x.shape)
        held[name] = held.get(name, 0) + math.prod(shape) * x.dtype.itemsize
    return held


def available_memory() -> int:
    """Bytes that the machine can still give."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")) << 10


def main() -> None:
    """An abort is expected: it dumps no core, and comes before the machine is out of memory."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    memory = int(MEMORY_SHARE * available_memory())
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    request, folder = json.loads(sys.argv[1]), Path(sys.argv[2])
    if "function" in request:
        result = compile_one(request, folder)
    else:
        try:
            devices = topology.devices(request["topology"])
            result = {"devices": len(devices), "compiler": compiler_of(devices[0])}
        except ValueError as error:
            result = {"error": str(error)}
    (folder / "result.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main()

"""Devices of TPUs that are not there: libtpu describes and compiles for them on any machine."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh

from jaxlm.sharding.mesh import mesh_over

# Set before jax is imported: libtpu asks nobody about a machine that has no TPU, shares its lock,
# and leaves no logs.
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_LOG_DIR": "disabled",
    "TF_CPP_MIN_LOG_LEVEL": "2",
    # A program out of the cache is not compiled, so nothing of it is dumped.
    "JAX_ENABLE_COMPILATION_CACHE": "0",
}


def environment(base: Mapping[str, str], libtpu_flags: Sequence[str] = ()) -> dict[str, str]:
    """`base` and what a process needs to compile for absent TPUs."""
    flags = " ".join([base.get("LIBTPU_INIT_ARGS", ""), *libtpu_flags]).strip()
    return {**base, **ENVIRONMENT, "LIBTPU_INIT_ARGS": flags}


def devices(topology: str) -> list[Any]:
    """All devices of a topology.

    Raises:
        ValueError: libtpu refuses the name.
    """
    try:
        return list(topologies.get_topology_desc(topology, platform="tpu").devices)
    except jax.errors.JaxRuntimeError as error:
        raise ValueError(f"topology={topology!r} is refused by libtpu: {error}") from error


def one_device_mesh(topology: str) -> Mesh:
    """The first device, as a mesh."""
    return Mesh(np.array(devices(topology)[:1]), ("device",), axis_types=(AxisType.Auto,))


def pod_mesh(topology: str, axes: Mapping[str, int]) -> Mesh:
    """All devices, as a mesh of named axes.

    Raises:
        ValueError: the sizes do not multiply to the number of devices.
    """
    all_devices = devices(topology)
    if math.prod(axes.values()) != len(all_devices):
        sizes = " × ".join(f"{name}={size}" for name, size in axes.items())
        raise ValueError(
            f"mesh: {sizes} = {math.prod(axes.values())}; allowed: sizes whose product is the "
            f"number of devices of {topology}, {len(all_devices)}"
        )
    return mesh_over(axes, all_devices)

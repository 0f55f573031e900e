"""How much the devices hold."""

from __future__ import annotations

import math
import os
import resource
from pathlib import Path
from typing import Any

import jax

# What a container may take, by the second and the first version of Linux's control groups.
CONTAINER_LIMITS = (
    Path("/sys/fs/cgroup/memory.max"),
    Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
)


def host_memory() -> int:
    """Bytes that this process can have of the host's memory at most."""
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    address_space, _ = resource.getrlimit(resource.RLIMIT_AS)
    if address_space != resource.RLIM_INFINITY:
        limits.append(address_space)
    container = [path.read_text().strip() for path in CONTAINER_LIMITS if path.is_file()]
    return min(limits + [int(text) for text in container if text.isdecimal()])  # or "max"


def device_memory() -> int | None:
    """Bytes of this process's devices together, or of the host whose CPU they are; None: they do
    not say.
    """
    devices = jax.local_devices()
    if devices[0].platform == "cpu":
        return host_memory()
    limits = [(device.memory_stats() or {}).get("bytes_limit") for device in devices]
    return None if None in limits else sum(limit for limit in limits if limit is not None)


def check_room(what: str, shapes: Any) -> None:
    """Raises MemoryError if arrays of these shapes and shardings can't lie on this process's
    devices, whatever else does: better than to be killed for them half-way.
    """
    room = device_memory()
    here = set(jax.local_devices())
    needed = sum(
        math.prod(x.sharding.shard_shape(x.shape))
        * x.dtype.itemsize
        * len(here & x.sharding.device_set)
        for x in jax.tree.leaves(shapes)
    )
    if room is not None and needed > room:
        raise MemoryError(
            f"{what} is {needed:,} bytes on this process's devices, which hold {room:,}; allowed: "
            "a smaller model, or more devices to cut it over (mesh.fsdp)"
        )

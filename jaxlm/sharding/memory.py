"""How much the devices hold."""

from __future__ import annotations

import os

import jax


def device_memory() -> int | None:
    """Bytes of this process's devices together, or of the host whose CPU they are; None: they do
    not say.
    """
    devices = jax.local_devices()
    if devices[0].platform == "cpu":
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limits = [(device.memory_stats() or {}).get("bytes_limit") for device in devices]
    return None if None in limits else sum(limit for limit in limits if limit is not None)

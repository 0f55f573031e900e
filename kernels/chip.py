"""Which TPU generation a program is being traced for."""

from __future__ import annotations

import jax

GENERATIONS = {
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
    "TPU7x": "tpu7x",
}
# Of scalars that a kernel may have: every generation has a mebibyte, of which XLA takes a bit.
SCALAR_BYTES = (1 << 20) - (16 << 10)


def target_chip() -> str | None:
    """The generation of the mesh that `jax.set_mesh` has set, else of the default backend's
    devices; None: no TPU, or one that the kernels have no sizes for.

    So a program compiled ahead of time, on a machine without a TPU, learns what it is for.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is not None:
        return GENERATIONS.get(device.device_kind)
    if jax.default_backend() != "tpu":
        return None
    return GENERATIONS.get(jax.devices()[0].device_kind)


def chip_or_target(chip: str | None) -> str:
    """None: what is traced for; without a TPU, as in interpret mode, v5e."""
    return chip or target_chip() or "v5e"

"""What one TPU of each generation can do."""

from __future__ import annotations

import dataclasses
import re


@dataclasses.dataclass(frozen=True)
class Chip:
    """One generation. Figures are of a core or of a chip, as they say; JAX's device is either."""

    name: str
    cores: int  # of a chip
    cores_per_device: int
    matrix_units: int  # of a core
    matrix_unit_width: int
    bf16_flops_per_cycle: int  # of a core
    bf16_flops_per_core: float  # a second
    hbm_bytes_per_second: float  # of a chip
    hbm_bytes: int  # of a chip
    vmem_bytes: int  # of a core
    ici_links: int  # of a chip, to its neighbours
    ici_link_bytes_per_second: float  # one way

    @property
    def clock_hz(self) -> float:
        """Cycles a second: the peak, shared out over what a cycle can do."""
        return self.bf16_flops_per_core / self.bf16_flops_per_cycle

    @property
    def device_bf16_flops(self) -> float:
        """Peak of what JAX calls a device."""
        return self.bf16_flops_per_core * self.cores_per_device

    @property
    def device_hbm_bytes_per_second(self) -> float:
        """HBM bandwidth of what JAX calls a device."""
        return self.hbm_bytes_per_second * self.cores_per_device / self.cores

    @property
    def device_hbm_bytes(self) -> float:
        """HBM of what JAX calls a device."""
        return self.hbm_bytes * self.cores_per_device / self.cores

    @property
    def device_ici_bytes_per_second(self) -> float:
        """What a device can take in from its neighbours, over all links of its chip at once."""
        links = self.ici_links * self.cores_per_device / self.cores
        return links * self.ici_link_bytes_per_second


# Public figures; a test holds them to jax's own. A 256-wide unit does two rows a cycle: libtpu
# schedules a 4096³ matmul at 94 % of 524,288 FLOPs a cycle, which 2 × 2 × 256² could not reach.
CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", 2, 1, 4, 128, 131_072, 1.375e14, 1.23e12, 34_400_000_000, 16 << 20, 6, 4.5e10),
        Chip("v5e", 1, 1, 4, 128, 131_072, 1.97e14, 8.2e11, 17_200_000_000, 128 << 20, 4, 4.5e10),
        Chip("v5p", 2, 2, 4, 128, 131_072, 2.295e14, 2.46e12, 103_000_000_000, 64 << 20, 6, 9e10),
        Chip("v6e", 1, 1, 2, 256, 524_288, 9.2e14, 1.64e12, 34_400_000_000, 128 << 20, 4, 9e10),
        Chip("tpu7x", 2, 1, 2, 256, 524_288, 1.155e15, 7.4e12, 206_000_000_000, 64 << 20, 6, 9e10),
    )
}


def chip_of(topology: str) -> Chip:
    """The chips of a topology such as v5e:2x2 or v5p:2x2x1.

    Raises:
        ValueError: the name has another form, or a generation that libtpu does not know by it.
    """
    generation, _, grid = topology.partition(":")
    if generation not in CHIPS or not re.fullmatch(r"\d+(x\d+){1,2}", grid):
        raise ValueError(
            f"topology={topology!r}; allowed: {', '.join(CHIPS)} and a grid of chips, "
            "as in v5e:2x2 or v5p:2x2x1"
        )
    return CHIPS[generation]

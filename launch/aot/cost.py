"""What one program costs on one device, by the compiler's own figures."""

from __future__ import annotations

import dataclasses
from typing import Any

from launch.aot.profile import Bundles


@dataclasses.dataclass(frozen=True)
class Memory:
    """HBM bytes of one device."""

    arguments: int
    outputs: int
    alias: int
    temporaries: int

    @property
    def total(self) -> int:
        """What the program needs at once: a donated argument is an output too."""
        return self.arguments + self.outputs - self.alias + self.temporaries


@dataclasses.dataclass(frozen=True)
class KernelCost:
    """One call of a Pallas kernel.

    Attributes:
        op: name of its instruction.
        kernel: name= of the pallas_call.
        runs: how often it is called.
        cycles: of one run, or None where the profiler gave none.
        microseconds: of one run.
        bundles: its instruction words, if they were dumped.
    """

    op: str
    kernel: str
    runs: int
    cycles: float | None
    microseconds: float | None
    bundles: Bundles | None


@dataclasses.dataclass(frozen=True)
class StaticCost:
    """One case on one device of a topology.

    Attributes:
        error: why it does not compile, or None.
        memory: None if it does not compile.
        kernels: calls of Pallas kernels.
        static_microseconds: cycles of all operations, one after the other; None without profile.
        is_lower_bound: the profile lacks operations, which count as fast as HBM can be.
        hbm_bytes: moved, see launch.aot.traffic.
        hbm_microseconds: what moving them takes at full bandwidth.
        notes: what the figures leave out.
    """

    topology: str
    error: str | None = None
    memory: Memory | None = None
    kernels: tuple[KernelCost, ...] = ()
    static_microseconds: float | None = None
    is_lower_bound: bool = False
    hbm_bytes: int | None = None
    hbm_microseconds: float | None = None
    notes: tuple[str, ...] = ()

    @property
    def compiles(self) -> bool:
        """For this topology."""
        return self.error is None

    @property
    def microseconds(self) -> float | None:
        """The time to quote: the static one, but not below what HBM allows; None if there is only
        a lower bound.
        """
        if self.static_microseconds is None or self.is_lower_bound:
            return None
        return self.at_least_microseconds

    @property
    def at_least_microseconds(self) -> float:
        """The same from what is known."""
        return max(self.static_microseconds or 0, self.hbm_microseconds or 0)

    @property
    def largest(self) -> Bundles | None:
        """Bundles of the kernel that has most of them."""
        known = [kernel.bundles for kernel in self.kernels if kernel.bundles]
        return max(known, key=lambda bundles: bundles.count, default=None)

    @property
    def bundles(self) -> int:
        """Of all kernels."""
        return sum(k.bundles.count for k in self.kernels if k.bundles)

    @property
    def spill_stores(self) -> int:
        """Of all kernels."""
        return sum(k.bundles.spill_stores for k in self.kernels if k.bundles)

    @property
    def inner_spill_stores(self) -> int:
        """Of all kernels' innermost loops."""
        return sum(k.bundles.inner_spill_stores for k in self.kernels if k.bundles)

    def to_json(self) -> dict[str, Any]:
        """All figures, the derived ones too."""
        largest = self.largest
        return {
            **dataclasses.asdict(self),
            "compiles": self.compiles,
            "microseconds": self.microseconds,
            "at_least_microseconds": self.at_least_microseconds,
            "hbm_total": self.memory.total if self.memory else None,
            "bundles": self.bundles,
            "spill_stores": self.spill_stores,
            "inner_spill_stores": self.inner_spill_stores,
            "busiest_unit": largest.busiest if largest else None,
            "busiest_share": largest.use[largest.busiest] if largest else None,
        }
